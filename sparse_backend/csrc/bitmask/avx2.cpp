// AVX2 has no expand instruction: eight mask bits index a table of byte shuffles. The next
// eight values are broadcast to both halves of a register, and one vpshufb puts each where
// its mask bit is: for bf16 straight into the upper halves of eight floats. Compiled with
// -mavx2 -mfma -mf16c -mpopcnt; called only where cpu_features() found all four.
//
// Cycles per 16 weights of one token on Zen 3, one thread, from L1 (the loser's in brackets):
// 3.5 as it stands; [3.9] 16-byte shuffles, two halves joined, then shift and mask into
// floats; [4.2] the same with mask bytes shifted out of a register instead of loaded one by
// one; [4.4] byte counts from a second table; [4.8] table offsets of a chunk computed with
// vector shifts and read back; [5.0] the shuffles as here, mask bytes rotated out of a register.
#include <immintrin.h>

#include "../unstructured/decode_avx2.h"
#include "kernel_impl.h"

namespace sparse_backend::bitmask {
namespace {

// shuffle[m]: for each of eight lanes of kLaneBytes, which bytes of the packed values go into
// its upper half under mask m; 0x80, for which vpshufb writes zero, for every other byte. Lanes
// of 4 bytes make bf16 values floats (8 KB, lives in L1); lanes of 2 keep halves as they are.
template <int kLaneBytes>
struct ExpandTable {
  alignas(64) uint8_t shuffle[256][8 * kLaneBytes];
  constexpr ExpandTable() : shuffle() {
    for (int mask = 0; mask < 256; ++mask) {
      for (int byte = 0; byte < 8 * kLaneBytes; ++byte) shuffle[mask][byte] = 0x80;
      int next = 0;
      for (int i = 0; i < 8; ++i) {
        if (((mask >> i) & 1) == 0) continue;
        uint8_t* upper_half = &shuffle[mask][kLaneBytes * (i + 1) - 2];
        upper_half[0] = static_cast<uint8_t>(2 * next);
        upper_half[1] = static_cast<uint8_t>(2 * next + 1);
        ++next;
      }
    }
  }
};
constexpr ExpandTable<4> kFloatTable;
constexpr ExpandTable<2> kHalfTable;

// Mask bytes are read one by one where they stand in the stream.
struct MaskBytes {
  const uint8_t* bytes;
  inline void read(const uint8_t* masks) { bytes = masks; }
};

template <Values kKind>
struct Avx2 {
  static constexpr Values kValues = kKind;
  using Decoder = unstructured::Avx2Decoder;
  using Stored = uint16_t;
  static constexpr int kBlock = 8;
  static constexpr int kParts = 1;
  static constexpr int kElements = 8;
  static constexpr int kGemvTokens = 4;
  static constexpr int kGemmTile = 3;
  using Element = float;
  using Masks = MaskBytes;
  using Operand = __m256;
  using Accumulator = __m256;

  // 16 registers: accumulators, a weight per row, one activation.
  static constexpr int rows_at_once(int tokens) { return tokens <= 2 ? 4 : tokens <= 4 ? 2 : 1; }

  static inline void decode(const Masks& masks, int row, int block, const uint16_t*& values,
                            Operand out[kParts]) {
    const uint64_t mask = masks.bytes[8 * row + block];
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
    values += __builtin_popcountll(mask);
    if constexpr (kKind != Values::kFp16) {
      const __m256i shuffle = *reinterpret_cast<const __m256i*>(kFloatTable.shuffle[mask]);
      out[0] = _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(packed), shuffle));
    } else {
      const __m128i shuffle = *reinterpret_cast<const __m128i*>(kHalfTable.shuffle[mask]);
      out[0] = _mm256_cvtph_ps(_mm_shuffle_epi8(packed, shuffle));
    }
  }

  static inline Operand load(const float* p) { return _mm256_load_ps(p); }
  static inline void store(float* p, Operand v) { _mm256_store_ps(p, v); }
  static inline Accumulator zero() { return _mm256_setzero_ps(); }
  static inline Accumulator multiply_add(Operand w, Operand x, Accumulator acc) {
    return _mm256_fmadd_ps(w, x, acc);
  }

  static inline float reduce(Accumulator acc) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(acc), _mm256_extractf128_ps(acc, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }

  static inline void prepare_block(const uint8_t* x, DType dtype, float* out) {
    const __m128i* halves = reinterpret_cast<const __m128i*>(x);
    switch (dtype) {
      case DType::kBf16: {
        const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(halves));
        return store(out, _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16)));
      }
      case DType::kFp16:
        return store(out, _mm256_cvtph_ps(_mm_loadu_si128(halves)));
      case DType::kFp32:
        return store(out, _mm256_loadu_ps(reinterpret_cast<const float*>(x)));
    }
  }
};

// Integer values: sixteen int16 products summed in pairs.
template <Values kKind>
struct Avx2Integer {
  static constexpr Values kValues = kKind;
  using Decoder = unstructured::Avx2Decoder;
  using Stored = uint16_t;
  static constexpr int kBlock = 16;
  static constexpr int kParts = 1;
  static constexpr int kElements = 16;
  static constexpr int kGemvTokens = 4;
  static constexpr int kGemmTile = 3;
  using Element = int16_t;
  using Masks = MaskBytes;
  using Operand = __m256i;
  using Accumulator = __m256i;
  using Sum = __m256;

  static constexpr int rows_at_once(int tokens) { return tokens <= 2 ? 4 : tokens <= 4 ? 2 : 1; }

  static inline __m128i expand8(uint64_t mask, const uint16_t*& values) {
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
    values += __builtin_popcountll(mask);
    return _mm_shuffle_epi8(packed, *reinterpret_cast<const __m128i*>(kHalfTable.shuffle[mask]));
  }

  static inline void decode(const Masks& masks, int row, int block, const uint16_t*& values,
                            Operand out[kParts]) {
    const uint8_t* bytes = masks.bytes + 8 * row + 2 * block;
    const __m128i low = expand8(bytes[0], values);
    const __m128i high = expand8(bytes[1], values);
    out[0] = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
  }

  static inline Operand load(const int16_t* p) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
  }
  static inline void store(int16_t* p, Operand v) { _mm256_store_si256(reinterpret_cast<__m256i*>(p), v); }
  static inline Accumulator zero() { return _mm256_setzero_si256(); }
  static inline Sum zero_sum() { return _mm256_setzero_ps(); }
  static inline Accumulator multiply_add(Operand w, Operand x, Accumulator acc) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(w, x));
  }
  static inline Sum add_scaled(Sum sum, Accumulator acc, float scale) {
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc), _mm256_set1_ps(scale), sum);
  }
  static inline float reduce(Sum sum) { return Avx2<Values::kBf16>::reduce(sum); }
};

}  // namespace

const Kernels& avx2_kernels(Values values) { return pick_kernels<Avx2, Avx2Integer>(values, "avx2"); }

}  // namespace sparse_backend::bitmask

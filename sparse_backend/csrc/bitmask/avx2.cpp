// AVX2 has no expand instruction: eight mask bits index a table of byte shuffles. The next
// eight values are broadcast to both halves of a register, and one vpshufb puts each where
// its mask bit is: for bf16 straight into the upper halves of eight floats. Compiled with
// -mavx2 -mfma -mf16c -mpopcnt; called only where cpu_features() found all four.
//
// An operand is four rows, and in each two neighbouring lanes: of two columns, or for integers of two pairs
// of columns. They are added when a row is complete.
//
// Cycles per 16 weights of one token on Zen 3, one thread, from L1 (the loser's in brackets):
// 3.5 as the shuffles stand; [3.9] 16-byte shuffles, two halves joined, then shift and mask into
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

// The same of bytes: eight to a mask.
struct ByteTable {
  alignas(64) uint8_t shuffle[256][8];
  constexpr ByteTable() : shuffle() {
    for (int mask = 0; mask < 256; ++mask) {
      uint8_t next = 0;
      for (int i = 0; i < 8; ++i) shuffle[mask][i] = ((mask >> i) & 1) != 0 ? next++ : uint8_t{0x80};
    }
  }
};
constexpr ByteTable kByteTable;

inline __m128i next8(uint64_t mask, const uint16_t*& values) {
  const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
  values += __builtin_popcountll(mask);
  return packed;
}

inline __m128i expand8(uint64_t mask, const uint16_t*& values) {
  const __m128i shuffle = *reinterpret_cast<const __m128i*>(kHalfTable.shuffle[mask]);
  return _mm_shuffle_epi8(next8(mask, values), shuffle);
}

// The next bytes at the places of eight mask bits, in the lower half.
inline __m128i expand8_bytes(uint64_t mask, const uint8_t*& bytes) {
  const __m128i packed = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes));
  const __m128i shuffle = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kByteTable.shuffle[mask]));
  bytes += __builtin_popcountll(mask);
  return _mm_shuffle_epi8(packed, shuffle);
}

// Words that a mask's decoded run may fill.
constexpr int kRunWords = 64 + unstructured::kDecodeGroup;

// The 16-bit floats of mask i, decoded to `words` unless they are words already; moves `run` past them.
// Always 64 of them: a loop that ends with the run would be mispredicted again and again.
template <Values kValues>
inline const uint16_t* next_words(const uint8_t* masks, int i, const uint8_t*& run,
                                  const ExponentTable& table, uint16_t* words) {
  using Decoder = unstructured::Avx2Decoder;
  if constexpr (mask_columns(kValues) == 2) {
    static_assert(Decoder::plain<kValues>(), "words");
    uint32_t mask;
    std::memcpy(&mask, masks + 4 * i, sizeof(mask));
    const auto* plain = reinterpret_cast<const uint16_t*>(run);
    run += 2 * __builtin_popcount(mask);
    return plain;
  }
  uint64_t mask;
  std::memcpy(&mask, masks + 8 * i, sizeof(mask));
  const int count = __builtin_popcountll(mask);
  Decoder::decode<kValues>(run, count, 64, table, words);
  run += unstructured::run_bytes(kValues, count);
  return words;
}

// 16 registers: accumulators, a weight, one activation.
template <Values kKind>
struct Avx2Shape {
  static constexpr Values kValues = kKind;
  static constexpr int kSums = 4, kVectorBytes = 32;
  static constexpr int kGemvTokens = 2, kGemvTiles = 1, kTileStrips = 1, kGemmTile = 3, kTileStep = 1;
  static constexpr bool kReorder = false, kOffset = false;
  static constexpr int streams(int tokens) { return tokens == 1 ? 2 : 1; }
  using Table = ExponentTable;
};

template <Values kKind>
struct Avx2 : Avx2Shape<kKind> {
  // A byte of a mask each: of kBf16x12 four rows' first two columns, then their last two.
  static constexpr int kPairs = mask_columns(kKind) / 2, kOperands = 4 * kPairs, kBroadcasts = kPairs;
  static constexpr int sum_of(int o) { return o / kPairs; }
  using Element = float;
  using Operand = __m256;
  using Accumulator = __m256;
  struct Rows {
    __m256 low, high;
  };
  using Sums = Rows;

  static inline void decode(const uint8_t* masks, int i, const uint8_t*& run, const ExponentTable& table,
                            Operand out[kOperands]) {
    uint16_t words[kRunWords];
    const uint16_t* values = next_words<kKind>(masks, i, run, table, words);
#pragma GCC unroll 8
    for (int o = 0; o < kOperands; ++o) {
      const uint64_t mask = masks[kOperands * i + o];
      if constexpr (kKind != Values::kFp16) {
        const __m256i shuffle = *reinterpret_cast<const __m256i*>(kFloatTable.shuffle[mask]);
        const __m256i packed = _mm256_broadcastsi128_si256(next8(mask, values));
        out[o] = _mm256_castsi256_ps(_mm256_shuffle_epi8(packed, shuffle));
      } else {
        out[o] = _mm256_cvtph_ps(expand8(mask, values));
      }
    }
  }
  static inline __m256 broadcast(const uint8_t* x) {
    return _mm256_castpd_ps(_mm256_broadcast_sd(reinterpret_cast<const double*>(x)));
  }
  static inline Operand load(const uint8_t* p) { return _mm256_load_ps(reinterpret_cast<const float*>(p)); }
  static inline void store(uint8_t* p, Operand v) { _mm256_store_ps(reinterpret_cast<float*>(p), v); }
  static inline Accumulator zero() { return _mm256_setzero_ps(); }
  static inline Accumulator multiply_add(Operand w, __m256 x, Accumulator acc) {
    return _mm256_fmadd_ps(w, x, acc);
  }
  static inline __m256 eight_rows(__m256 a, __m256 b) {
    const __m256d sums = _mm256_castps_pd(_mm256_hadd_ps(a, b));  // rows 0, 1, 4, 5, 2, 3, 6, 7
    return _mm256_castpd_ps(_mm256_permute4x64_pd(sums, 0xD8));
  }
  static inline Rows rows(const Accumulator acc[]) {
    return {eight_rows(acc[0], acc[1]), eight_rows(acc[2], acc[3])};
  }
  static inline Sums no_sums() { return {zero(), zero()}; }
  static inline void store_rows(float* out, const Rows& v) {
    _mm256_store_ps(out, v.low);
    _mm256_store_ps(out + 8, v.high);
  }
};

// Integer values: sixteen int16 products summed in pairs.
template <Values kKind>
struct Avx2Integer : Avx2Shape<kKind> {
  static constexpr int kOperands = 4, kBroadcasts = 1;
  static constexpr int sum_of(int o) { return o; }
  using Element = int16_t;
  using Operand = __m256i;
  using Accumulator = __m256i;
  struct Rows {
    __m256i low, high;
  };
  using Sums = Avx2<Values::kBf16>::Rows;

  static inline void decode(const uint8_t* masks, int i, const uint8_t*& run, const ExponentTable&,
                            Operand out[kOperands]) {
    uint8_t codes[kKind == Values::kInt4 ? 64 + 8 : 1];
    const uint8_t* bytes = run;
    if constexpr (kKind == Values::kInt4) {
      uint64_t mask;
      std::memcpy(&mask, masks + 8 * i, sizeof(mask));
      for (int half = 0; half < 2; ++half) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + 32 * half),
                            unstructured::int4_bytes(run + 16 * half));
      }
      bytes = codes;
      run += unstructured::run_bytes(kKind, __builtin_popcountll(mask));
    }
#pragma GCC unroll 4
    for (int o = 0; o < kOperands; ++o) {
      const __m128i low = expand8_bytes(masks[8 * i + 2 * o], bytes);
      const __m128i high = expand8_bytes(masks[8 * i + 2 * o + 1], bytes);
      out[o] = _mm256_cvtepi8_epi16(_mm_unpacklo_epi64(low, high));
    }
    if constexpr (kKind != Values::kInt4) run = bytes;
  }
  static inline __m256i broadcast(const uint8_t* x) {
    int64_t columns;
    std::memcpy(&columns, x, sizeof(columns));
    return _mm256_set1_epi64x(columns);
  }
  static inline Operand load(const uint8_t* p) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
  }
  static inline void store(uint8_t* p, Operand v) { _mm256_store_si256(reinterpret_cast<__m256i*>(p), v); }
  static inline Accumulator zero() { return _mm256_setzero_si256(); }
  static inline Accumulator multiply_add(Operand w, __m256i x, Accumulator acc) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(w, x));
  }
  static inline __m256i eight_rows(__m256i a, __m256i b) {
    return _mm256_permute4x64_epi64(_mm256_hadd_epi32(a, b), 0xD8);
  }
  static inline Rows rows(const Accumulator acc[]) {
    return {eight_rows(acc[0], acc[1]), eight_rows(acc[2], acc[3])};
  }
  static inline Sums no_sums() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static inline Sums add_scaled(const Sums& sums, const Rows& rows, const float* scales) {
    return {_mm256_fmadd_ps(_mm256_cvtepi32_ps(rows.low), _mm256_loadu_ps(scales), sums.low),
            _mm256_fmadd_ps(_mm256_cvtepi32_ps(rows.high), _mm256_loadu_ps(scales + 8), sums.high)};
  }
  static inline void store_rows(float* out, const Sums& v) { Avx2<Values::kBf16>::store_rows(out, v); }
};

}  // namespace

const Kernels& avx2_kernels(Values values) {
  return unstructured::kernel_table<Avx2, Avx2Integer>(
      values, [](auto simd) { return make_kernels<decltype(simd)>("avx2"); });
}

}  // namespace sparse_backend::bitmask

// AVX2 has no expand instruction: eight mask bits index a table of byte shuffles, and one
// vpshufb moves up to eight consecutive values to their places. Compiled with
// -mavx2 -mfma -mf16c -mpopcnt; called only where cpu_features() found all four.
#include <immintrin.h>

#include "kernel_impl.h"

namespace sparse_backend::bitmask {
namespace {

// shuffle[m][2 i], shuffle[m][2 i + 1]: the bytes of the value that belongs at position i
// under mask m, or 0x80 (vpshufb writes zero) where bit i of m is clear. 4 KB, lives in L1.
struct ExpandTable {
  alignas(64) uint8_t shuffle[256][16];
  constexpr ExpandTable() : shuffle() {
    for (int mask = 0; mask < 256; ++mask) {
      int next = 0;
      for (int i = 0; i < 8; ++i) {
        const bool stored = (mask >> i) & 1;
        shuffle[mask][2 * i] = static_cast<uint8_t>(stored ? 2 * next : 0x80);
        shuffle[mask][2 * i + 1] = static_cast<uint8_t>(stored ? 2 * next + 1 : 0x80);
        next += stored;
      }
    }
  }
};
constexpr ExpandTable kExpand;

// Tried and slower on Zen 3 (4.3 cycles per 16 weights as it stands, one thread, from L2):
// byte counts from a second table (4.4), all table offsets of a chunk computed with vector
// shifts and read back (4.8), -mtune=znver3 (4.4).
inline __m128i expand8(uint32_t mask, const uint16_t*& values) {
  const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
  values += __builtin_popcount(mask);
  return _mm_shuffle_epi8(packed, *reinterpret_cast<const __m128i*>(kExpand.shuffle[mask]));
}

// A decoded block is 16 columns in two vectors of eight floats. bf16: the even columns
// (shift left) and the odd ones (mask); fp16: the first eight and the last eight.
template <DType kValueType>
struct Avx2 {
  static constexpr int kBlock = 16;
  static constexpr int kParts = 2;
  static constexpr int kElements = 8;
  static constexpr int kGemvTokens = 4;
  static constexpr int kGemmTile = 3;
  using Element = float;
  using Masks = MaskWords;
  using Operand = __m256;
  using Accumulator = __m256;

  // 16 registers: accumulators, two parts per row, one activation.
  static constexpr int rows_at_once(int tokens) { return tokens <= 2 ? 4 : tokens <= 4 ? 2 : 1; }

  static inline void decode(const Masks& masks, int row, int block, const uint16_t*& values,
                            Operand out[kParts]) {
    const auto mask = static_cast<uint32_t>(masks.mask[row] >> (block * kBlock));
    const __m128i low = expand8(mask & 0xFF, values);
    const __m128i high = expand8((mask >> 8) & 0xFF, values);
    if constexpr (kValueType == DType::kBf16) {
      const __m256i both = _mm256_set_m128i(high, low);
      out[0] = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
      out[1] = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xFFFF0000U))));
    } else {
      out[0] = _mm256_cvtph_ps(low);
      out[1] = _mm256_cvtph_ps(high);
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
    if constexpr (kValueType == DType::kBf16) {
      if (dtype == DType::kBf16) {
        const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
        const __m256i odd = _mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xFFFF0000U)));
        _mm256_store_ps(out, _mm256_castsi256_ps(_mm256_slli_epi32(both, 16)));
        _mm256_store_ps(out + 8, _mm256_castsi256_ps(odd));
        return;
      }
      for (int i = 0; i < kBlock; ++i) out[(i & 1) * 8 + i / 2] = load_as_float(x, dtype, i);
    } else {
      for (int i = 0; i < kBlock; ++i) out[i] = load_as_float(x, dtype, i);
    }
  }
};

}  // namespace

const Kernels& avx2_kernels(DType value_type) {
  static constexpr Kernels bf16 = make_kernels<Avx2<DType::kBf16>>("avx2");
  static constexpr Kernels fp16 = make_kernels<Avx2<DType::kFp16>>("avx2");
  return value_type == DType::kBf16 ? bf16 : fp16;
}

}  // namespace sparse_backend::bitmask

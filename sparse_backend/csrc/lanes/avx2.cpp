// AVX2: an operand is two registers of eight rows. Compiled with -mavx2 -mfma -mf16c -mpopcnt.
#include "../unstructured/decode_avx2.h"
#include "kernel_impl.h"

namespace sparse_backend::lanes {
namespace {

inline __m256i load32(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

inline __m256i broadcast_dword(const uint8_t* x) {
  int32_t dword;
  std::memcpy(&dword, x, sizeof(dword));
  return _mm256_set1_epi32(dword);
}

struct Avx2Table {
  __m256i exponents;
  explicit Avx2Table(const ExponentTable& table)
      : exponents(
            _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table.exponent)))) {}
};

template <Values kKind>
struct Avx2 {
  static constexpr Values kValues = kKind;
  static constexpr int kParts = 2, kSums = 2, kGemvTokens = 2, kGemvTiles = 1, kGemmTile = 2, kOffset = 0;
  static constexpr int kPer = kKind == Values::kBf16x12 ? 4 : 2;
  static constexpr int kSteps = kBlockColumns / kPer;
  static constexpr int kTileStrips = 1, kGemmSums = kSums;
  static constexpr int streams(int tokens) { return tokens == 1 ? 2 : 1; }
  using Element = float;
  using Operand = __m256;
  using Accumulator = __m256;
  using Sum = __m256;
  using Table = Avx2Table;

  // The two columns of a register of words.
  static inline void floats(__m256i words, Operand& even, Operand& odd) {
    even = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
    odd = _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xFFFF0000U))));
  }

  template <int kStep>
  static inline void decode(const uint8_t* run, const Table& table, Operand out[kPer][kParts]) {
#pragma GCC unroll 2
    for (int p = 0; p < kParts; ++p) {
      if constexpr (kKind == Values::kFp16) {
        const auto* halves = reinterpret_cast<const __m128i*>(run) + 4 * kStep + p;
        out[0][p] = _mm256_cvtph_ps(_mm_loadu_si128(halves));
        out[1][p] = _mm256_cvtph_ps(_mm_loadu_si128(halves + 2));
      } else if constexpr (kKind == Values::kBf16) {
        floats(load32(run + 64 * kStep + 32 * p), out[0][p], out[1][p]);
      } else {
        const __m256i codes = unstructured::half_bytes(run + kBlockWeights + 32 * kStep + 16 * p);
        const __m256i high = _mm256_shuffle_epi8(table.exponents, codes);
        const __m256i low = load32(run + 64 * kStep + 32 * p);
        const __m256i a = _mm256_unpacklo_epi8(low, high), b = _mm256_unpackhi_epi8(low, high);
        floats(_mm256_or_si256(_mm256_srli_epi16(a, 1), _mm256_slli_epi16(a, 15)), out[0][p], out[1][p]);
        floats(_mm256_or_si256(_mm256_srli_epi16(b, 1), _mm256_slli_epi16(b, 15)), out[2][p], out[3][p]);
      }
    }
  }
  static inline Operand load(const uint8_t* p) { return _mm256_load_ps(reinterpret_cast<const float*>(p)); }
  static inline void store(uint8_t* p, Operand v) { _mm256_store_ps(reinterpret_cast<float*>(p), v); }
  static inline Accumulator zero() { return _mm256_setzero_ps(); }
  static inline __m256 broadcast(const uint8_t* x) {
    return _mm256_broadcast_ss(reinterpret_cast<const float*>(x));
  }
  static inline Accumulator multiply_add(Operand w, __m256 x, Accumulator acc) {
    return _mm256_fmadd_ps(w, x, acc);
  }
  static inline Accumulator add_sums(Accumulator a, Accumulator b) { return _mm256_add_ps(a, b); }
  static inline void store_floats(float* out, int part, Accumulator v) { _mm256_store_ps(out + 8 * part, v); }
};

template <Values kKind>
struct Avx2Integer {
  static constexpr Values kValues = kKind;
  static constexpr int kParts = 2, kSums = 2, kGemvTokens = 2, kGemvTiles = 1, kGemmTile = 2;
  static constexpr int kPer = kKind == Values::kInt4 ? 4 : 2;
  static constexpr int kSteps = kBlockColumns / 2 / kPer;
  static constexpr int kOffset = kKind == Values::kInt4 ? 8 : 0;  // as in avx512.cpp
  static constexpr int kTileStrips = 1, kGemmSums = kSums;
  static constexpr int streams(int tokens) { return tokens == 1 ? 2 : 1; }
  using Element = int16_t;
  using Operand = __m256i;
  using Accumulator = __m256i;
  using Sum = __m256;
  using Table = Avx2Table;

  template <int kStep>
  static inline void decode(const uint8_t* run, const Table&, Operand out[kPer][kParts]) {
#pragma GCC unroll 2
    for (int p = 0; p < kParts; ++p) {
      if constexpr (kKind == Values::kInt8) {
        const auto* bytes = reinterpret_cast<const __m128i*>(run) + 4 * kStep + p;
        out[0][p] = _mm256_cvtepi8_epi16(_mm_loadu_si128(bytes));
        out[1][p] = _mm256_cvtepi8_epi16(_mm_loadu_si128(bytes + 2));
      } else {
        const __m256i line =
            _mm256_xor_si256(load32(run + 64 * kStep + 32 * p), _mm256_set1_epi8(static_cast<char>(0x88)));
        const __m256i low = _mm256_set1_epi16(15);
        out[0][p] = _mm256_and_si256(line, low);
        out[1][p] = _mm256_and_si256(_mm256_srli_epi16(line, 4), low);
        out[2][p] = _mm256_and_si256(_mm256_srli_epi16(line, 8), low);
        out[3][p] = _mm256_srli_epi16(line, 12);
      }
    }
  }
  static inline Operand load(const uint8_t* p) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
  }
  static inline void store(uint8_t* p, Operand v) { _mm256_store_si256(reinterpret_cast<__m256i*>(p), v); }
  static inline Accumulator zero() { return _mm256_setzero_si256(); }
  static inline Sum zero_sum() { return _mm256_setzero_ps(); }
  static inline __m256i broadcast(const uint8_t* x) { return broadcast_dword(x); }
  static inline Accumulator multiply_add(Operand w, __m256i x, Accumulator acc) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(w, x));
  }
  static inline Accumulator add_sums(Accumulator a, Accumulator b) { return _mm256_add_epi32(a, b); }
  static inline Accumulator subtract(Accumulator a, int32_t value) {
    return _mm256_sub_epi32(a, _mm256_set1_epi32(value));
  }
  static inline Sum add_scaled(Sum sum, Accumulator acc, const float* scales, int part) {
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc), _mm256_loadu_ps(scales + 8 * part), sum);
  }
  static inline void store_floats(float* out, int part, Sum v) { _mm256_store_ps(out + 8 * part, v); }
};

}  // namespace

const Kernels& avx2_kernels(Values values) { return pick_kernels<Avx2, Avx2Integer>(values, "avx2"); }

}  // namespace sparse_backend::lanes

// AVX-512 with VNNI and VBMI: an operand is one register, a column's activation the broadcast memory
// operand of its multiply-add. Per 64 weights of bf16x12: 8 instructions to two registers of words, 4 to
// floats, 4 multiply-adds.
#include "../dot_avx512.h"
#include "../unstructured/decode_avx512.h"
#include "avx512_words.h"
#include "kernel_impl.h"

namespace sparse_backend::lanes {
namespace {

template <Values kKind>
struct Avx512 {
  static constexpr Values kValues = kKind;
  static constexpr int kParts = 1, kSums = 2, kGemvTokens = 8, kGemvTiles = 4, kOffset = 0;
  static constexpr int kTileStrips = 2, kGemmTile = 6, kGemmSums = kSums;
  static constexpr int kPer = kKind == Values::kBf16x12 ? 4 : 2;
  static constexpr int kSteps = kBlockColumns / kPer;
  static constexpr int streams(int tokens) { return tokens <= 2 ? 4 : tokens <= 4 ? 2 : 1; }
  using Element = float;
  using Operand = __m512;
  using Accumulator = __m512;
  using Sum = __m512;
  using Table = WordTable<kKind>;

  template <int kStep>
  static inline void decode(const uint8_t* run, const Table& table, Operand out[kPer][kParts]) {
    if constexpr (kKind == Values::kFp16) {
      const auto* halves = reinterpret_cast<const __m256i*>(run) + 2 * kStep;
      out[0][0] = _mm512_cvtph_ps(_mm256_loadu_si256(halves));
      out[1][0] = _mm512_cvtph_ps(_mm256_loadu_si256(halves + 1));
    } else {
      __m512i words[kPer / 2];
      table.template words<kStep>(run, words);
      const __m512i high = _mm512_set1_epi32(static_cast<int>(0xFFFF0000U));
#pragma GCC unroll 2
      for (int i = 0; i < kPer / 2; ++i) {
        out[2 * i][0] = _mm512_castsi512_ps(_mm512_slli_epi32(words[i], 16));
        out[2 * i + 1][0] = _mm512_castsi512_ps(_mm512_and_si512(words[i], high));
      }
    }
  }
  static inline Operand load(const uint8_t* p) { return _mm512_load_ps(p); }
  static inline void store(uint8_t* p, Operand v) { _mm512_store_ps(reinterpret_cast<float*>(p), v); }
  static inline Accumulator zero() { return _mm512_setzero_ps(); }
  static inline __m512 broadcast(const uint8_t* x) {
    return _mm512_set1_ps(*reinterpret_cast<const float*>(x));  // of a float GCC makes a memory operand
  }
  static inline Accumulator multiply_add(Operand w, __m512 x, Accumulator acc) {
    return _mm512_fmadd_ps(w, x, acc);
  }
  static inline Accumulator add_sums(Accumulator a, Accumulator b) { return _mm512_add_ps(a, b); }
  static inline void store_floats(float* out, int, Accumulator v) { _mm512_store_ps(out, v); }
};

template <Values kKind>
struct Avx512Integer {
  static constexpr Values kValues = kKind;
  static constexpr int kParts = 1, kSums = 2, kGemvTokens = 8, kGemvTiles = 4;
  static constexpr int kTileStrips = 2, kGemmTile = 12, kGemmSums = 1;
  static constexpr int kPer = kKind == Values::kInt4 ? 4 : 2;
  static constexpr int kSteps = kBlockColumns / 2 / kPer;
  // Half bytes are taken as they are, 0 to 15, with the sign bit turned round.
  static constexpr int kOffset = kKind == Values::kInt4 ? 8 : 0;
  static constexpr int streams(int tokens) { return tokens <= 2 ? 4 : tokens <= 4 ? 2 : 1; }
  using Element = int16_t;
  using Operand = __m512i;
  using Accumulator = __m512i;
  using Sum = __m512;
  using Table = WordTable<kKind>;

  template <int kStep>
  static inline void decode(const uint8_t* run, const Table&, Operand out[kPer][kParts]) {
    if constexpr (kKind == Values::kInt8) {
      const auto* bytes = reinterpret_cast<const __m256i*>(run) + 2 * kStep;
      out[0][0] = _mm512_cvtepi8_epi16(_mm256_loadu_si256(bytes));
      out[1][0] = _mm512_cvtepi8_epi16(_mm256_loadu_si256(bytes + 1));
    } else {
      const __m512i line =
          _mm512_xor_si512(_mm512_loadu_si512(run + 64 * kStep), _mm512_set1_epi8(static_cast<char>(0x88)));
      const __m512i low = _mm512_set1_epi16(15);
      out[0][0] = _mm512_and_si512(line, low);
      out[1][0] = _mm512_and_si512(_mm512_srli_epi16(line, 4), low);
      out[2][0] = _mm512_and_si512(_mm512_srli_epi16(line, 8), low);
      out[3][0] = _mm512_srli_epi16(line, 12);
    }
  }
  static inline Operand load(const uint8_t* p) { return _mm512_load_si512(p); }
  static inline void store(uint8_t* p, Operand v) { _mm512_store_si512(p, v); }
  static inline Accumulator zero() { return _mm512_setzero_si512(); }
  static inline Sum zero_sum() { return _mm512_setzero_ps(); }
  static inline __m512i broadcast(const uint8_t* x) { return broadcast_dword(x); }
  static inline Accumulator multiply_add(Operand w, __m512i x, Accumulator acc) {
    return dot_words(acc, w, x);
  }
  static inline Accumulator add_sums(Accumulator a, Accumulator b) { return _mm512_add_epi32(a, b); }
  static inline Accumulator subtract(Accumulator a, int32_t value) {
    return _mm512_add_epi32(a, _mm512_set1_epi32(-value));
  }
  static inline Sum add_scaled(Sum sum, Accumulator acc, const float* scales, int) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc), _mm512_loadu_ps(scales), sum);
  }
  static inline void store_floats(float* out, int, Sum v) { _mm512_store_ps(out, v); }
};

}  // namespace

const Kernels& avx512_kernels(Values values) { return pick_kernels<Avx512, Avx512Integer>(values, "avx512"); }

}  // namespace sparse_backend::lanes

// AVX-512 with VBMI and VNNI: float arithmetic, and vpdpwssd for integer values. Activations of other
// types go through batches, where a register is 16 tokens.
#include "../dot_avx512.h"
#include "avx512_gemv.h"

namespace sparse_backend::sell {
namespace {

template <Values kKind>
struct Avx512 {
  static constexpr Values kValues = kKind;
  static constexpr bool kInteger = unstructured::is_integer(kKind);
  using Decoder = unstructured::Avx512Decoder;
  using Stored = std::conditional_t<kInteger, uint8_t, uint16_t>;
  static constexpr int kLanes = 16;
  using Vector = std::conditional_t<kInteger, __m512i, __m512>;

  static inline Vector zero() {
    if constexpr (kInteger) {
      return _mm512_setzero_si512();
    } else {
      return _mm512_setzero_ps();
    }
  }
  static inline Vector multiply_add(uint32_t weight, const uint8_t* x, Vector acc) {
    if constexpr (kInteger) {
      return dot_words(acc, _mm512_set1_epi32(static_cast<int>(weight)), _mm512_load_si512(x));
    } else {
      return _mm512_fmadd_ps(_mm512_set1_ps(float_from_bits(weight)), _mm512_load_ps(x), acc);
    }
  }
  static inline void add_scaled(float* out, Vector acc, float scale) {
    if constexpr (kInteger) {
      const __m512 sums = _mm512_cvtepi32_ps(acc);
      _mm512_storeu_ps(out, _mm512_fmadd_ps(sums, _mm512_set1_ps(scale), _mm512_loadu_ps(out)));
    } else {
      _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(out), acc));
    }
  }

  // acc += w * x: the first of a row's two entries, then the second.
  static inline Vector two_entries(__m512i w, __m512i x, Vector acc) {
    if constexpr (kInteger) {
      return dot_words(acc, w, x);
    } else if constexpr (kKind == Values::kFp16) {
      const auto floats = [](__m512i v) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v)); };
      acc = _mm512_fmadd_ps(floats(w), floats(x), acc);
      return _mm512_fmadd_ps(floats(_mm512_srli_epi32(w, 16)), floats(_mm512_srli_epi32(x, 16)), acc);
    } else {
      const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000U));
      const auto first = [](__m512i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)); };
      const auto second = [&](__m512i v) { return _mm512_castsi512_ps(_mm512_and_si512(v, upper)); };
      acc = _mm512_fmadd_ps(first(w), first(x), acc);
      return _mm512_fmadd_ps(second(w), second(x), acc);
    }
  }
};

template <Values kKind>
constexpr Kernels make() {
  using Simd = Avx512<kKind>;
  return {"avx512",
          gemv<Avx512Level, Simd>,
          kBatchTokens,
          gemv_takes<kKind>,
          prepare<Avx512Level, Simd>,
          batch<Simd>,
          16};
}

}  // namespace

const Kernels& avx512_kernels(Values values) {
  static constexpr Kernels table[] = {make<Values::kBf16>(), make<Values::kFp16>(), make<Values::kBf16x12>(),
                                      make<Values::kInt8>(), make<Values::kInt4>()};
  return table[static_cast<int>(values)];
}

}  // namespace sparse_backend::sell

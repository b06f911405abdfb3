// AVX-512 BF16: a row's two entries and their activations are the operands of vdpbf16ps as they stand.
// Compiled with avx512.cpp's flags and -mavx512bf16.
#include "avx512_gemv.h"

namespace sparse_backend::sell {
namespace {

template <Values kKind>
struct Avx512Bf16 {
  static constexpr Values kValues = kKind;
  static constexpr bool kInteger = false;
  using Vector = __m512;
  static inline Vector zero() { return _mm512_setzero_ps(); }
  static inline Vector two_entries(__m512i w, __m512i x, Vector acc) {
    return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)x);
  }
};

template <Values kKind>
constexpr Kernels make() {
  using Simd = Avx512Bf16<kKind>;  // takes bf16 activations only, and those in any number: it has no batch()
  return {"avx512_bf16",
          gemv<Avx512Level, Simd>,
          kBatchTokens,
          gemv_takes<kKind>,
          prepare<Avx512Level, Simd>,
          nullptr,
          16};
}

}  // namespace

const Kernels& avx512_bf16_kernels(Values values) {
  static constexpr Kernels plain = make<Values::kBf16>(), coded = make<Values::kBf16x12>();
  return values == Values::kBf16 ? plain : coded;
}

}  // namespace sparse_backend::sell

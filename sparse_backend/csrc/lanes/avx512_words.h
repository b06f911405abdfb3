// From a block's run to registers of 16 rows x 2 columns of bf16, for both AVX-512 levels.
#pragma once

#include <immintrin.h>

#include "../unstructured/decode_avx512.h"
#include "layout.h"

namespace sparse_backend::lanes {
namespace {

using unstructured::broadcast_dword;

template <Values kKind>
struct WordTable {
  unstructured::CodeTable<kKind> exponents;
  explicit WordTable(const unstructured::ExponentTable& table) : exponents(table) {}

  // Two columns, or of kBf16x12 four: the orders of value_at().
  template <int kStep>
  inline void words(const uint8_t* run, __m512i out[]) const {
    if constexpr (kKind == Values::kBf16x12) {
      const __m512i high = exponents.look_up(run + kBlockWeights + 32 * kStep);
      const __m512i low = _mm512_loadu_si512(run + 64 * kStep);
      const __m512i a = _mm512_unpacklo_epi8(low, high), b = _mm512_unpackhi_epi8(low, high);
      out[0] = _mm512_shrdi_epi16(a, a, 1);
      out[1] = _mm512_shrdi_epi16(b, b, 1);
    } else {
      out[0] = _mm512_loadu_si512(run + 64 * kStep);
    }
  }
};

}  // namespace
}  // namespace sparse_backend::lanes

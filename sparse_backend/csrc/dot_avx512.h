// Dot products of integers in the 32-bit lanes of AVX-512 VNNI.
//
// Their sums are pinned: GCC 12 would copy every one before and after its dot product, and runs out of
// registers.
#pragma once

#include <immintrin.h>

namespace sparse_backend {
namespace {

inline __m512i pinned(__m512i sum) {
#if !defined(SPARSE_BACKEND_EMULATE_AVX512)
  __asm__ volatile("" : "+v"(sum));
#endif
  return sum;
}

// sum + four products of unsigned and signed bytes.
inline __m512i dot_bytes(__m512i sum, __m512i of_unsigned, __m512i of_signed) {
  return pinned(_mm512_dpbusd_epi32(sum, of_unsigned, of_signed));
}

// sum + two products of signed words.
inline __m512i dot_words(__m512i sum, __m512i a, __m512i b) { return pinned(_mm512_dpwssd_epi32(sum, a, b)); }

}  // namespace
}  // namespace sparse_backend

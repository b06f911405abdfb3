// vpexpandw and vpexpandb with their destination zeroed first. On Zen 5 the zero-masking form still waits
// for the register's old value: 5 cycles each in one register, 1 after a vpxord of it,
// which the renamer resolves. Compilers neither know nor write that, hence the assembly.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace sparse_backend::bitmask {
namespace {

// The next popcount(mask) values, each moved to the position of its mask bit; zeros elsewhere.
inline __m512i expand32(uint32_t mask, const uint16_t*& values) {
  const __m512i packed = _mm512_loadu_si512(values);
  values += __builtin_popcount(mask);
#if defined(SPARSE_BACKEND_EMULATE_AVX512)
  return _mm512_maskz_expand_epi16(mask, packed);
#else
  __m512i expanded;
  __asm__("vpxord %0, %0, %0\n\tvpexpandw %2, %0 %{%1%}%{z%}"
          : "=&v"(expanded)
          : "Yk"(static_cast<__mmask32>(mask)), "v"(packed));
  return expanded;
#endif
}

// The same for bytes.
inline __m512i expand64(uint64_t mask, const uint8_t*& values) {
  const __m512i packed = _mm512_loadu_si512(values);
  values += __builtin_popcountll(mask);
#if defined(SPARSE_BACKEND_EMULATE_AVX512)
  return _mm512_maskz_expand_epi8(mask, packed);
#else
  __m512i expanded;
  __asm__("vpxord %0, %0, %0\n\tvpexpandb %2, %0 %{%1%}%{z%}"
          : "=&v"(expanded)
          : "Yk"(static_cast<__mmask64>(mask)), "v"(packed));
  return expanded;
#endif
}

}  // namespace
}  // namespace sparse_backend::bitmask

// Included before lowbit/avx_vnni.cpp on machines without AVX-VNNI: the one instruction it adds to
// AVX2, as a loop. The rest of that file runs on the real instructions.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

inline __m256i emulated_dpbusd(__m256i sum, __m256i u, __m256i s) {
  int32_t lanes[8];
  uint8_t a[32];
  int8_t b[32];
  std::memcpy(lanes, &sum, 32);
  std::memcpy(a, &u, 32);
  std::memcpy(b, &s, 32);
  for (int i = 0; i < 32; ++i) lanes[i / 4] += static_cast<int32_t>(a[i]) * b[i];
  std::memcpy(&sum, lanes, 32);
  return sum;
}
#define _mm256_dpbusd_avx_epi32 emulated_dpbusd

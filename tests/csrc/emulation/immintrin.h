// Stands in for the compiler's <immintrin.h> when the AVX-512 kernels are compiled for a
// machine that lacks AVX-512: the intrinsics they use, written as loops. Tests the kernels'
// logic (tails, strides, orders), not their instructions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct alignas(64) __m512i {
  uint16_t h[32];
};
struct alignas(64) __m512 {
  float f[16];
};
struct alignas(32) __m256i {
  uint16_t h[16];
};
using __m512bh = __m512i;
using __mmask32 = uint32_t;

template <class To, class From>
inline To emulated_cast(const From& from) {
  To to;
  static_assert(sizeof(to) == sizeof(from), "");
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline float emulated_float(uint32_t bits) { return emulated_cast<float>(bits); }

inline __m512i _mm512_loadu_si512(const void* p) {
  __m512i r;
  std::memcpy(&r, p, 64);
  return r;
}
inline __m512i _mm512_load_si512(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 64) __builtin_trap();  // the real one faults
  return _mm512_loadu_si512(p);
}
inline void _mm512_store_si512(void* p, const __m512i& v) {
  if (reinterpret_cast<uintptr_t>(p) % 64) __builtin_trap();
  std::memcpy(p, &v, 64);
}
inline __m512 _mm512_load_ps(const void* p) { return emulated_cast<__m512>(_mm512_load_si512(p)); }
inline void _mm512_store_ps(float* p, const __m512& v) { _mm512_store_si512(p, emulated_cast<__m512i>(v)); }
inline __m512 _mm512_setzero_ps() { return __m512{}; }
inline __m512 _mm512_castsi512_ps(const __m512i& v) { return emulated_cast<__m512>(v); }

inline __m512i _mm512_maskz_expand_epi16(__mmask32 mask, const __m512i& v) {
  __m512i r{};
  int next = 0;
  for (int i = 0; i < 32; ++i) {
    if ((mask >> i) & 1U) r.h[i] = v.h[next++];
  }
  return r;
}
inline __m512i _mm512_set1_epi32(int value) {
  __m512i r;
  for (int i = 0; i < 16; ++i) std::memcpy(&r.h[2 * i], &value, 4);
  return r;
}
inline __m512i _mm512_and_si512(const __m512i& a, const __m512i& b) {
  __m512i r;
  for (int i = 0; i < 32; ++i) r.h[i] = a.h[i] & b.h[i];
  return r;
}
inline __m512i _mm512_slli_epi32(const __m512i& v, int count) {
  __m512i r;
  for (int i = 0; i < 16; ++i) {
    uint32_t lane;
    std::memcpy(&lane, &v.h[2 * i], 4);
    lane <<= count;
    std::memcpy(&r.h[2 * i], &lane, 4);
  }
  return r;
}
inline __m256i _mm512_castsi512_si256(const __m512i& v) {
  __m256i r;
  std::memcpy(&r, &v, 32);
  return r;
}
inline __m256i _mm512_extracti64x4_epi64(const __m512i& v, int half) {
  __m256i r;
  std::memcpy(&r, &v.h[16 * half], 32);
  return r;
}
inline __m512 _mm512_cvtph_ps(const __m256i& v) {
  __m512 r;
  for (int i = 0; i < 16; ++i) {
    _Float16 half;
    std::memcpy(&half, &v.h[i], 2);
    r.f[i] = static_cast<float>(half);
  }
  return r;
}
inline __m512 _mm512_fmadd_ps(const __m512& a, const __m512& b, const __m512& c) {
  __m512 r;
  for (int i = 0; i < 16; ++i) r.f[i] = std::fma(a.f[i], b.f[i], c.f[i]);
  return r;
}
inline __m512 _mm512_dpbf16_ps(const __m512& acc, const __m512bh& a, const __m512bh& b) {
  __m512 r;
  for (int i = 0; i < 16; ++i) {
    float sum = acc.f[i];
    for (int j = 1; j >= 0; --j) {
      sum += emulated_float(uint32_t{a.h[2 * i + j]} << 16) * emulated_float(uint32_t{b.h[2 * i + j]} << 16);
    }
    r.f[i] = sum;
  }
  return r;
}
inline float _mm512_reduce_add_ps(const __m512& v) {
  float s[16];
  std::memcpy(s, v.f, sizeof(s));
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) s[i] += s[i + width];
  }
  return s[0];
}

// AVX-512 VNNI and VBMI, for lowbit/.

template <class Lane, class F>
inline __m512i emulated_lanes(const __m512i& a, const __m512i& b, F f) {
  Lane x[64 / sizeof(Lane)], y[64 / sizeof(Lane)];
  std::memcpy(x, &a, 64);
  std::memcpy(y, &b, 64);
  for (size_t i = 0; i < 64 / sizeof(Lane); ++i) x[i] = static_cast<Lane>(f(x[i], y[i]));
  __m512i r;
  std::memcpy(&r, x, 64);
  return r;
}

inline void _mm512_storeu_si512(void* p, const __m512i& v) { std::memcpy(p, &v, 64); }
inline __m512i _mm512_setzero_si512() { return __m512i{}; }
inline __m512i _mm512_set1_epi8(char value) {
  __m512i r;
  std::memset(&r, value, 64);
  return r;
}
inline __m512i _mm512_add_epi32(const __m512i& a, const __m512i& b) {
  return emulated_lanes<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return x + y; });
}
inline __m512i _mm512_sub_epi8(const __m512i& a, const __m512i& b) {
  return emulated_lanes<uint8_t>(a, b, [](uint8_t x, uint8_t y) { return x - y; });
}
inline __m512i _mm512_min_epu8(const __m512i& a, const __m512i& b) {
  return emulated_lanes<uint8_t>(a, b, [](uint8_t x, uint8_t y) { return x < y ? x : y; });
}
inline __m512i _mm512_srli_epi16(const __m512i& a, unsigned count) {
  return emulated_lanes<uint16_t>(a, a, [=](uint16_t x, uint16_t) { return x >> count; });
}
inline __m512i _mm512_srai_epi32(const __m512i& a, unsigned count) {
  return emulated_lanes<int32_t>(a, a, [=](int32_t x, int32_t) { return x >> count; });
}
inline __m512i _mm512_permutex2var_epi8(const __m512i& a, const __m512i& index, const __m512i& b) {
  uint8_t table[128];
  std::memcpy(table, &a, 64);
  std::memcpy(table + 64, &b, 64);
  return emulated_lanes<uint8_t>(index, index, [&](uint8_t i, uint8_t) { return table[i & 127]; });
}
// Four unsigned by signed products per lane, added without saturation.
inline int32_t emulated_dot(int32_t sum, const uint8_t* u, const int8_t* s) {
  for (int j = 0; j < 4; ++j) sum += static_cast<int32_t>(u[j]) * s[j];
  return sum;
}
inline __m512i _mm512_dpbusd_epi32(const __m512i& sum, const __m512i& u, const __m512i& s) {
  int32_t lanes[16];
  std::memcpy(lanes, &sum, 64);
  for (int i = 0; i < 16; ++i) {
    lanes[i] = emulated_dot(lanes[i], reinterpret_cast<const uint8_t*>(&u) + 4 * i,
                            reinterpret_cast<const int8_t*>(&s) + 4 * i);
  }
  __m512i r;
  std::memcpy(&r, lanes, 64);
  return r;
}

#include "tile_state.h"
#include "words.h"

// More of the emulated intrinsics, for unstructured/ and sell/. Included by immintrin.h.
#pragma once

struct alignas(16) __m128i {
  uint16_t h[8];
};
using __mmask16 = uint16_t;
using __mmask64 = uint64_t;

inline __m128i _mm_loadu_si128(const __m128i* p) {
  __m128i r;
  std::memcpy(&r, static_cast<const void*>(p), 16);
  return r;
}
inline __m256i _mm256_loadu_si256(const __m256i* p) {
  __m256i r;
  std::memcpy(&r, static_cast<const void*>(p), 32);
  return r;
}
inline __m512 _mm512_loadu_ps(const void* p) { return emulated_cast<__m512>(_mm512_loadu_si512(p)); }
inline void _mm512_storeu_ps(void* p, const __m512& v) { std::memcpy(p, &v, 64); }
inline __m512i _mm512_castps_si512(const __m512& v) { return emulated_cast<__m512i>(v); }
// Masked-off lanes are not read: a fault there does not happen.
inline __m512i _mm512_maskz_loadu_epi32(__mmask16 mask, const void* p) {
  __m512i r{};
  for (int i = 0; i < 16; ++i) {
    if ((mask >> i) & 1U) std::memcpy(&r.h[2 * i], static_cast<const uint8_t*>(p) + 4 * i, 4);
  }
  return r;
}
inline __m256i _mm256_maskz_loadu_epi16(__mmask16 mask, const void* p) {
  __m256i r{};
  for (int i = 0; i < 16; ++i) {
    if ((mask >> i) & 1U) std::memcpy(&r.h[i], static_cast<const uint8_t*>(p) + 2 * i, 2);
  }
  return r;
}
inline __m512i _mm512_maskz_expand_epi8(__mmask64 mask, const __m512i& v) {
  uint8_t from[64], to[64] = {};
  std::memcpy(from, &v, 64);
  int next = 0;
  for (int i = 0; i < 64; ++i) {
    if ((mask >> i) & 1U) to[i] = from[next++];
  }
  return _mm512_loadu_si512(to);
}

// Lanes of one type widened to, or narrowed from, lanes of another.
template <class To, class From, class Result, class Source>
inline Result emulated_convert(const Source& v) {
  constexpr size_t kCount = sizeof(Result) / sizeof(To) < sizeof(Source) / sizeof(From)
                                ? sizeof(Result) / sizeof(To)
                                : sizeof(Source) / sizeof(From);
  From from[sizeof(Source) / sizeof(From)];
  To to[sizeof(Result) / sizeof(To)] = {};
  std::memcpy(from, &v, sizeof(v));
  for (size_t i = 0; i < kCount; ++i) to[i] = static_cast<To>(from[i]);
  Result r;
  std::memcpy(&r, to, sizeof(r));
  return r;
}
inline __m512i _mm512_cvtepu8_epi16(const __m256i& v) {
  return emulated_convert<uint16_t, uint8_t, __m512i>(v);
}
inline __m512i _mm512_cvtepi8_epi16(const __m256i& v) {
  return emulated_convert<int16_t, int8_t, __m512i>(v);
}
inline __m512i _mm512_cvtepu8_epi32(const __m128i& v) {
  return emulated_convert<uint32_t, uint8_t, __m512i>(v);
}
inline __m256i _mm512_cvtepi32_epi16(const __m512i& v) {
  return emulated_convert<uint16_t, uint32_t, __m256i>(v);
}
inline __m512 _mm512_cvtepi32_ps(const __m512i& v) { return emulated_convert<float, int32_t, __m512>(v); }

inline __m512i _mm512_permutexvar_epi16(const __m512i& index, const __m512i& v) {
  __m512i r;
  for (int i = 0; i < 32; ++i) r.h[i] = v.h[index.h[i] % 32];
  return r;
}

inline __m512i _mm512_broadcast_i32x4(const __m128i& v) {
  __m512i r;
  for (int i = 0; i < 32; ++i) r.h[i] = v.h[i % 8];
  return r;
}
inline __m512i _mm512_set1_epi16(short value) {
  __m512i r;
  for (auto& lane : r.h) lane = static_cast<uint16_t>(value);
  return r;
}
inline __m512 _mm512_set1_ps(float value) {
  __m512 r;
  for (float& lane : r.f) lane = value;
  return r;
}
inline __m512i _mm512_setr_epi64(int64_t a, int64_t b, int64_t c, int64_t d, int64_t e, int64_t f, int64_t g,
                                 int64_t h) {
  const int64_t lanes[8] = {a, b, c, d, e, f, g, h};
  return _mm512_loadu_si512(lanes);
}
inline __m512 _mm512_add_ps(const __m512& a, const __m512& b) {
  __m512 r;
  for (int i = 0; i < 16; ++i) r.f[i] = a.f[i] + b.f[i];
  return r;
}
inline __m512i _mm512_or_si512(const __m512i& a, const __m512i& b) {
  return emulated_lanes<uint64_t>(a, b, [](uint64_t x, uint64_t y) { return x | y; });
}
inline __m512i _mm512_xor_si512(const __m512i& a, const __m512i& b) {
  return emulated_lanes<uint64_t>(a, b, [](uint64_t x, uint64_t y) { return x ^ y; });
}
inline __m512i _mm512_slli_epi16(const __m512i& a, unsigned count) {
  return emulated_lanes<uint16_t>(a, a, [=](uint16_t x, uint16_t) { return x << count; });
}
inline __m512i _mm512_srli_epi32(const __m512i& a, unsigned count) {
  return emulated_lanes<uint32_t>(a, a, [=](uint32_t x, uint32_t) { return x >> count; });
}
// The pair b:a of each lane, shifted right.
inline __m512i _mm512_shrdi_epi16(const __m512i& a, const __m512i& b, int count) {
  return emulated_lanes<uint16_t>(a, b,
                                  [=](uint16_t x, uint16_t y) { return x >> count | y << (16 - count); });
}
inline __m512i _mm512_dpwssd_epi32(const __m512i& sum, const __m512i& a, const __m512i& b) {
  int32_t lanes[16];
  std::memcpy(lanes, &sum, 64);
  for (int i = 0; i < 32; ++i) {
    lanes[i / 2] += static_cast<int32_t>(static_cast<int16_t>(a.h[i])) * static_cast<int16_t>(b.h[i]);
  }
  return _mm512_loadu_si512(lanes);
}

template <class Lane>
inline __m512i emulated_permute2(const __m512i& a, const __m512i& index, const __m512i& b) {
  constexpr size_t kCount = 64 / sizeof(Lane);
  Lane table[2 * kCount];
  std::memcpy(table, &a, 64);
  std::memcpy(table + kCount, &b, 64);
  return emulated_lanes<Lane>(index, index, [&](Lane i, Lane) { return table[i & (2 * kCount - 1)]; });
}
inline __m512i _mm512_permutex2var_epi16(const __m512i& a, const __m512i& index, const __m512i& b) {
  return emulated_permute2<uint16_t>(a, index, b);
}
inline __m512i _mm512_permutex2var_epi32(const __m512i& a, const __m512i& index, const __m512i& b) {
  return emulated_permute2<uint32_t>(a, index, b);
}
inline __m512i _mm512_permutex2var_epi64(const __m512i& a, const __m512i& index, const __m512i& b) {
  return emulated_permute2<uint64_t>(a, index, b);
}
inline __m512i _mm512_permutexvar_epi8(const __m512i& index, const __m512i& table) {
  uint8_t bytes[64];
  std::memcpy(bytes, &table, 64);
  return emulated_lanes<uint8_t>(index, index, [&](uint8_t i, uint8_t) { return bytes[i & 63]; });
}
// Bytes of a and b in turn, from the lower (kFirst 0) or upper (8) half of each 16.
template <int kFirst>
inline __m512i emulated_unpack(const __m512i& a, const __m512i& b) {
  uint8_t x[64], y[64], r[64];
  std::memcpy(x, &a, 64);
  std::memcpy(y, &b, 64);
  for (int i = 0; i < 64; ++i) r[i] = (i & 1 ? y : x)[i / 16 * 16 + kFirst + i % 16 / 2];
  return _mm512_loadu_si512(r);
}
inline __m512i _mm512_unpacklo_epi8(const __m512i& a, const __m512i& b) { return emulated_unpack<0>(a, b); }
inline __m512i _mm512_unpackhi_epi8(const __m512i& a, const __m512i& b) { return emulated_unpack<8>(a, b); }

template <class Lane>
inline uint64_t emulated_test(const __m512i& a, const __m512i& b) {
  Lane x[64 / sizeof(Lane)], y[64 / sizeof(Lane)];
  std::memcpy(x, &a, 64);
  std::memcpy(y, &b, 64);
  uint64_t mask = 0;
  for (size_t i = 0; i < 64 / sizeof(Lane); ++i) mask |= uint64_t{(x[i] & y[i]) != 0} << i;
  return mask;
}
inline __mmask32 _mm512_test_epi16_mask(const __m512i& a, const __m512i& b) {
  return static_cast<__mmask32>(emulated_test<uint16_t>(a, b));
}
inline __mmask16 _mm512_test_epi32_mask(const __m512i& a, const __m512i& b) {
  return static_cast<__mmask16>(emulated_test<uint32_t>(a, b));
}
inline __m512i _mm512_mask_blend_epi16(__mmask32 mask, const __m512i& a, const __m512i& b) {
  __m512i r;
  for (int i = 0; i < 32; ++i) r.h[i] = (mask >> i) & 1U ? b.h[i] : a.h[i];
  return r;
}
inline __m512i _mm512_mask_blend_epi32(__mmask16 mask, const __m512i& a, const __m512i& b) {
  __m512i r;
  for (int i = 0; i < 32; ++i) r.h[i] = (mask >> (i / 2)) & 1U ? b.h[i] : a.h[i];
  return r;
}

#include "order.h"  // which builds on this

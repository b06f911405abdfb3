// More of the emulated intrinsics, for bitmask/order_avx512.cpp and what came with it. Included by
// immintrin.h.
#pragma once

inline __m512i _mm512_srai_epi16(const __m512i& a, unsigned count) {
  return emulated_lanes<int16_t>(a, a, [=](int16_t x, int16_t) { return x >> count; });
}

inline __m512i _mm512_sub_epi32(const __m512i& a, const __m512i& b) {
  return emulated_lanes<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return x - y; });
}

template <class Lane>
inline __m512i emulated_keep(uint64_t mask, const __m512i& v) {
  Lane lanes[64 / sizeof(Lane)];
  std::memcpy(lanes, &v, 64);
  for (size_t i = 0; i < 64 / sizeof(Lane); ++i) {
    if (((mask >> i) & 1U) == 0) lanes[i] = 0;
  }
  return _mm512_loadu_si512(lanes);
}
inline __m512i _mm512_maskz_permutex2var_epi8(__mmask64 mask, const __m512i& a, const __m512i& index,
                                              const __m512i& b) {
  return emulated_keep<uint8_t>(mask, _mm512_permutex2var_epi8(a, index, b));
}
inline __m512i _mm512_movm_epi8(__mmask64 mask) { return emulated_keep<uint8_t>(mask, _mm512_set1_epi8(-1)); }
inline __mmask64 _mm512_movepi8_mask(const __m512i& v) {
  return emulated_test<uint8_t>(v, _mm512_set1_epi8(-128));
}

// Masked-off lanes are not read: a fault there does not happen.
template <class Lane>
inline __m512i emulated_masked_load(uint64_t mask, const void* p) {
  Lane lanes[64 / sizeof(Lane)] = {};
  for (size_t i = 0; i < 64 / sizeof(Lane); ++i) {
    if ((mask >> i) & 1U) std::memcpy(lanes + i, static_cast<const Lane*>(p) + i, sizeof(Lane));
  }
  return _mm512_loadu_si512(lanes);
}
inline __m512i _mm512_maskz_loadu_epi16(__mmask32 mask, const void* p) {
  return emulated_masked_load<uint16_t>(mask, p);
}
inline __m512i _mm512_maskz_loadu_epi8(__mmask64 mask, const void* p) {
  return emulated_masked_load<uint8_t>(mask, p);
}

template <class Lane>
inline __m512i emulated_compress(uint64_t mask, const __m512i& v) {
  Lane from[64 / sizeof(Lane)], to[64 / sizeof(Lane)] = {};
  std::memcpy(from, &v, 64);
  int next = 0;
  for (size_t i = 0; i < 64 / sizeof(Lane); ++i) {
    if ((mask >> i) & 1U) to[next++] = from[i];
  }
  return _mm512_loadu_si512(to);
}
inline __m512i _mm512_maskz_compress_epi16(__mmask32 mask, const __m512i& v) {
  return emulated_compress<uint16_t>(mask, v);
}
inline __m512i _mm512_maskz_compress_epi8(__mmask64 mask, const __m512i& v) {
  return emulated_compress<uint8_t>(mask, v);
}

// Lanes of a and b in turn, from the lower or upper half of each 128 bits.
template <class Lane, bool kUpper>
inline __m512i emulated_unpack_lanes(const __m512i& a, const __m512i& b) {
  constexpr int kPer = 16 / sizeof(Lane), kCount = 4 * kPer;
  Lane x[kCount], y[kCount], r[kCount];
  std::memcpy(x, &a, 64);
  std::memcpy(y, &b, 64);
  for (int i = 0; i < kCount; ++i)
    r[i] = (i & 1 ? y : x)[i / kPer * kPer + (kUpper ? kPer / 2 : 0) + i % kPer / 2];
  return _mm512_loadu_si512(r);
}
inline __m512i _mm512_unpacklo_epi32(const __m512i& a, const __m512i& b) {
  return emulated_unpack_lanes<uint32_t, false>(a, b);
}
inline __m512i _mm512_unpackhi_epi32(const __m512i& a, const __m512i& b) {
  return emulated_unpack_lanes<uint32_t, true>(a, b);
}
inline __m512i _mm512_unpacklo_epi64(const __m512i& a, const __m512i& b) {
  return emulated_unpack_lanes<uint64_t, false>(a, b);
}
inline __m512i _mm512_unpackhi_epi64(const __m512i& a, const __m512i& b) {
  return emulated_unpack_lanes<uint64_t, true>(a, b);
}
// 128-bit lanes: two of a, then two of b.
inline __m512i _mm512_shuffle_i32x4(const __m512i& a, const __m512i& b, int which) {
  __m512i r;
  for (int i = 0; i < 4; ++i) std::memcpy(&r.h[8 * i], &(i < 2 ? a : b).h[8 * ((which >> 2 * i) & 3)], 16);
  return r;
}

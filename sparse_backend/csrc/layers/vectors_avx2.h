// Eight floats; AVX2, FMA, F16C.
#pragma once

#include <immintrin.h>

#include "../activations.h"

namespace sparse_backend::layers {
namespace {

struct Avx2Vector {
  static constexpr int kLanes = 8;
  static constexpr int kTileTokens = 2;
  static constexpr int kTileParts = 2;
  using Reg = __m256;

  static inline Reg set1(float v) { return _mm256_set1_ps(v); }
  static inline Reg load(const float* p) { return _mm256_loadu_ps(p); }
  static inline void store(float* p, Reg v) { _mm256_storeu_ps(p, v); }
  static inline Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static inline Reg sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
  static inline Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static inline Reg div(Reg a, Reg b) { return _mm256_div_ps(a, b); }
  static inline Reg max(Reg a, Reg b) { return _mm256_max_ps(a, b); }
  static inline Reg min(Reg a, Reg b) { return _mm256_min_ps(a, b); }
  static inline Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static inline float sum(Reg v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  static inline float largest(Reg v) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
  }
  static inline Reg keep_from(Reg x, Reg bound, Reg v) {
    return _mm256_and_ps(_mm256_cmp_ps(x, bound, _CMP_NLT_UQ), v);
  }
  static inline Reg scale_by_power(Reg v, Reg n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(v, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  }
  static inline Reg nearest(Reg v) {
    return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }

  template <DType kType>
  static inline Reg load_as(const void* p, int64_t i) {
    if constexpr (kType == DType::kFp32) return _mm256_loadu_ps(static_cast<const float*>(p) + i);
    const __m128i half =
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(p) + i));
    if constexpr (kType == DType::kFp16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  template <DType kType>
  static inline Reg load_part(const void* p, int64_t i, int count) {
    alignas(32) float lanes[kLanes] = {};
    for (int j = 0; j < count; ++j) lanes[j] = read_float<kType>(p, i + j);
    return _mm256_load_ps(lanes);
  }
  template <DType kType>
  static inline void store_as(void* p, int64_t i, Reg v) {
    if constexpr (kType == DType::kFp32) {
      _mm256_storeu_ps(static_cast<float*>(p) + i, v);
    } else {
      __m128i half;
      if constexpr (kType == DType::kFp16) {
        half = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
      } else {
        const __m256i bits = _mm256_castps_si256(v);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
        const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
        const __m256i top = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
        half = _mm_packus_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
      }
      _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<uint16_t*>(p) + i), half);
    }
  }
  template <DType kType>
  static inline void store_part(void* p, int64_t i, Reg v, int count) {
    constexpr int kBytes = kType == DType::kFp32 ? 4 : 2;
    alignas(32) uint8_t lanes[kLanes * kBytes];
    store_as<kType>(lanes, 0, v);
    std::memcpy(static_cast<uint8_t*>(p) + i * kBytes, lanes, static_cast<size_t>(count) * kBytes);
  }
};

}  // namespace
}  // namespace sparse_backend::layers

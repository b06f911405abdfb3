// Sixteen floats; AVX-512 F, BW and VL.
#pragma once

#include <immintrin.h>

#include "../activations.h"

namespace sparse_backend::layers {
namespace {

struct Avx512Vector {
  static constexpr int kLanes = 16;
  static constexpr int kTileTokens = 4;
  static constexpr int kTileParts = 4;
  using Reg = __m512;

  static inline Reg set1(float v) { return _mm512_set1_ps(v); }
  static inline Reg load(const float* p) { return _mm512_loadu_ps(p); }
  static inline void store(float* p, Reg v) { _mm512_storeu_ps(p, v); }
  static inline Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static inline Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
  static inline Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static inline Reg div(Reg a, Reg b) { return _mm512_div_ps(a, b); }
  static inline Reg max(Reg a, Reg b) { return _mm512_max_ps(a, b); }
  static inline Reg min(Reg a, Reg b) { return _mm512_min_ps(a, b); }
  static inline Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static inline float sum(Reg v) { return _mm512_reduce_add_ps(v); }
  static inline float largest(Reg v) { return _mm512_reduce_max_ps(v); }
  static inline Reg keep_from(Reg x, Reg bound, Reg v) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, bound, _CMP_NLT_UQ), v);
  }
  static inline Reg scale_by_power(Reg v, Reg n) { return _mm512_scalef_ps(v, n); }
  static inline Reg nearest(Reg v) {
    return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }

  template <DType kType>
  static inline Reg load_as(const void* p, int64_t i) {
    if constexpr (kType == DType::kFp32) return _mm512_loadu_ps(static_cast<const float*>(p) + i);
    const void* at = static_cast<const uint16_t*>(p) + i;
    return widen<kType>(_mm256_loadu_si256(static_cast<const __m256i*>(at)));
  }
  template <DType kType>
  static inline Reg load_part(const void* p, int64_t i, int count) {
    const __mmask16 mask = first(count);
    if constexpr (kType == DType::kFp32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(p) + i);
    return widen<kType>(_mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(p) + i));
  }
  template <DType kType>
  static inline void store_as(void* p, int64_t i, Reg v) {
    if constexpr (kType == DType::kFp32) {
      _mm512_storeu_ps(static_cast<float*>(p) + i, v);
    } else {
      void* at = static_cast<uint16_t*>(p) + i;
      _mm256_storeu_si256(static_cast<__m256i*>(at), narrow<kType>(v));
    }
  }
  template <DType kType>
  static inline void store_part(void* p, int64_t i, Reg v, int count) {
    const __mmask16 mask = first(count);
    if constexpr (kType == DType::kFp32) {
      _mm512_mask_storeu_ps(static_cast<float*>(p) + i, mask, v);
    } else {
      _mm256_mask_storeu_epi16(static_cast<uint16_t*>(p) + i, mask, narrow<kType>(v));
    }
  }

 private:
  static inline __mmask16 first(int count) { return static_cast<__mmask16>((1U << count) - 1); }
  template <DType kType>
  static inline Reg widen(__m256i half) {
    if constexpr (kType == DType::kFp16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  template <DType kType>
  static inline __m256i narrow(Reg v) {
    if constexpr (kType == DType::kFp16) return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(quiet, 16));
  }
};

}  // namespace
}  // namespace sparse_backend::layers

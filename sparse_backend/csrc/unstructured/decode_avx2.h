// Decoding runs of values (values.h) with AVX2.
#pragma once

#include <immintrin.h>

#include "values.h"

namespace sparse_backend::unstructured {
namespace {

// The 32 half bytes of 16 bytes, in order, one to a byte; the upper half is zero.
inline __m256i half_bytes(const uint8_t* p) {
  const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_and_si256(_mm256_or_si256(wide, _mm256_slli_epi16(wide, 4)), _mm256_set1_epi8(15));
}

// The same as int8.
inline __m256i int4_bytes(const uint8_t* p) {
  const __m256i signs = _mm256_set1_epi8(8);
  return _mm256_sub_epi8(_mm256_xor_si256(half_bytes(p), signs), signs);
}

inline void store_bytes_as_int16(__m256i bytes, uint16_t* words) {
  __m256i* out = reinterpret_cast<__m256i*>(words);
  _mm256_storeu_si256(out, _mm256_cvtepi8_epi16(_mm256_castsi256_si128(bytes)));
  _mm256_storeu_si256(out + 1, _mm256_cvtepi8_epi16(_mm256_extracti128_si256(bytes, 1)));
}

struct Avx2Decoder {
  template <Values kValues>
  static constexpr bool plain() {
    return kValues == Values::kBf16 || kValues == Values::kFp16;
  }

  template <Values kValues>
  static inline void decode(const uint8_t* run, int64_t n, int64_t least, const ExponentTable& table,
                            uint16_t* words) {
    const __m256i exponents =
        _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table.exponent)));
    const int64_t count = n > least ? n : least;
    for (int64_t i = 0; i < count; i += 32) group<kValues>(run, n, i, exponents, words);
  }

 private:
  // Values i to i + 31 of a run of n.
  template <Values kValues>
  static inline void group(const uint8_t* run, int64_t n, int64_t i, __m256i exponents, uint16_t* words) {
    if constexpr (kValues == Values::kInt8) {
      store_bytes_as_int16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(run + i)), words + i);
    } else if constexpr (kValues == Values::kInt4) {
      store_bytes_as_int16(int4_bytes(run + i / 2), words + i);
    } else {
      const __m256i high = _mm256_shuffle_epi8(exponents, half_bytes(run + n + i / 2));
      const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(run + i));
      const __m256i a = _mm256_unpacklo_epi8(low, high), b = _mm256_unpackhi_epi8(low, high);
      const __m256i first = _mm256_permute2x128_si256(a, b, 0x20);
      const __m256i last = _mm256_permute2x128_si256(a, b, 0x31);
      __m256i* out = reinterpret_cast<__m256i*>(words + i);
      _mm256_storeu_si256(out, _mm256_or_si256(_mm256_srli_epi16(first, 1), _mm256_slli_epi16(first, 15)));
      _mm256_storeu_si256(out + 1, _mm256_or_si256(_mm256_srli_epi16(last, 1), _mm256_slli_epi16(last, 15)));
    }
  }
};

}  // namespace
}  // namespace sparse_backend::unstructured

// Decoding runs of values (values.h) with AVX-512 VBMI and VBMI2: 64 values of 12 bits in ten
// vector instructions, in order.
#pragma once

#include <immintrin.h>

#include "values.h"

namespace sparse_backend::unstructured {
namespace {

// The 64 half bytes of 32 bytes, in order, one in the low half of each byte. The upper halves
// are garbage: vpermb looks at six bits, and its tables below repeat every 16 entries.
inline __m512i half_bytes_garbled(const uint8_t* p) {
  const __m512i wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_or_si512(wide, _mm512_slli_epi16(wide, 4));
}

inline __m512i repeated_table(const void* sixteen_bytes) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(sixteen_bytes)));
}

// What 4-bit codes mean, for vpermb: exponents, or of kInt4 signed numbers.
template <Values kValues>
struct CodeTable {
  __m512i codes;
  explicit CodeTable(const ExponentTable& exponents) {
    alignas(16) static constexpr int8_t kSigned[16] = {0,  1,  2,  3,  4,  5,  6,  7,
                                                       -8, -7, -6, -5, -4, -3, -2, -1};
    codes = repeated_table(kValues == Values::kInt4 ? static_cast<const void*>(kSigned) : exponents.exponent);
  }
  // 64 codes as bytes.
  inline __m512i look_up(const uint8_t* halves) const {
    return _mm512_permutexvar_epi8(half_bytes_garbled(halves), codes);
  }
};

inline __m512i broadcast_dword(const uint8_t* x) {
  int32_t dword;
  std::memcpy(&dword, x, sizeof(dword));
  return _mm512_set1_epi32(dword);
}

// Integers are decoded to bytes, not words: vpexpandb places bytes as fast.
struct Avx512Decoder {
  template <Values kValues>
  static constexpr bool plain() {
    return kValues != Values::kBf16x12 && kValues != Values::kInt4;
  }

  template <Values kValues>
  static inline void decode(const uint8_t* run, int64_t n, int64_t least, const ExponentTable& table,
                            uint16_t* words) {
    const Group<kValues> group(table);
    const int64_t count = n > least ? n : least;
    for (int64_t i = 0; i < count; i += kDecodeGroup) group.decode(run, n, i, words);
  }

 private:
  template <Values kValues>
  struct Group {
    CodeTable<kValues> table_;
    explicit Group(const ExponentTable& table) : table_(table) {}

    // Values i to i + 63 of a run of n.
    inline void decode(const uint8_t* run, int64_t n, int64_t i, uint16_t* words) const {
      if constexpr (kValues == Values::kInt4) {
        const __m512i bytes = table_.look_up(run + i / 2);
        _mm512_storeu_si512(reinterpret_cast<uint8_t*>(words) + i, bytes);
      } else {
        // vpunpck works within 128-bit lanes; these put the lanes of its two results in order.
        const __m512i first_lanes = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
        const __m512i last_lanes = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
        const __m512i high = table_.look_up(run + n + i / 2);
        const __m512i low = _mm512_loadu_si512(run + i);
        __m512i a = _mm512_unpacklo_epi8(low, high), b = _mm512_unpackhi_epi8(low, high);
        a = _mm512_shrdi_epi16(a, a, 1);
        b = _mm512_shrdi_epi16(b, b, 1);
        _mm512_storeu_si512(words + i, _mm512_permutex2var_epi64(a, first_lanes, b));
        _mm512_storeu_si512(words + i + 32, _mm512_permutex2var_epi64(a, last_lanes, b));
      }
    }
  };
};

}  // namespace
}  // namespace sparse_backend::unstructured

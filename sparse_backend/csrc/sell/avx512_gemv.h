// Both AVX-512 levels: the product of a strip with any number of tokens.
//
// A block's 128 activations of a token are a table in four registers, the low bytes and the high bytes of
// their 16 bits. vpermi2b looks 64 entries' columns up in each, two unpacks make them words: 16 rows' pairs
// of entries, the operands of two dot products, with weights that were unpacked alike. Zen 5, per step of 64
// entries, from L1: 8 cycles with decoding for one token, 3.5 for each of four tokens together.
//
// A policy has: kValues, kInteger, Vector, zero(), two_entries(weights, activations, sums).
#pragma once

#include <immintrin.h>

#include <type_traits>

#include "../unstructured/decode_avx512.h"
#include "gemv_impl.h"

namespace sparse_backend::sell {
namespace {

// kFirstBytes.mask[n]: the first 2 n of 64 bytes.
struct FirstBytes {
  uint64_t mask[kSliceRows + 1];
  constexpr FirstBytes() : mask() {
    for (int n = 0; n <= kSliceRows; ++n)
      mask[n] = n == kSliceRows ? ~uint64_t{0} : (uint64_t{1} << 2 * n) - 1;
  }
};
constexpr FirstBytes kFirstBytes;

// The weights of one step after the other, as words: rows 0-3, 8-11, 16-19 and 24-27 of the slice in
// `first`, the others in `last`. Past the active rows they are finite numbers, of other weights.
template <Values kValues>
class Weights {
 public:
  Weights(const Block& block, const ExponentTable& table, int64_t ahead, bool to_l2)
      : at_(block, ahead, to_l2), table_(table) {}

  inline void next(int active, __mmask64 bytes, __m512i& first, __m512i& last) {
    if constexpr (kValues == Values::kBf16x12) {
      const __m512i high = table_.look_up(at_.codes);
      const __m512i low = _mm512_loadu_si512(at_.run);
      first = _mm512_unpacklo_epi8(low, high);
      last = _mm512_unpackhi_epi8(low, high);
      first = _mm512_shrdi_epi16(first, first, 1);
      last = _mm512_shrdi_epi16(last, last, 1);
    } else if constexpr (unstructured::is_integer(kValues)) {
      __m512i v;
      if constexpr (kValues == Values::kInt8) {
        v = _mm512_loadu_si512(at_.run);
      } else {
        v = table_.look_up(at_.run);
      }
      first = _mm512_srai_epi16(_mm512_unpacklo_epi8(v, v), 8);
      last = _mm512_srai_epi16(_mm512_unpackhi_epi8(v, v), 8);
    } else {  // what follows the active rows might be taken for infinities
      const auto low_half = static_cast<__mmask32>(bytes), high_half = static_cast<__mmask32>(bytes >> 32);
      const __m512i a = _mm512_maskz_loadu_epi16(low_half, at_.run);
      const __m512i b = _mm512_maskz_loadu_epi16(high_half, at_.run + 64);
      first = _mm512_permutex2var_epi64(a, _mm512_setr_epi64(0, 1, 4, 5, 8, 9, 12, 13), b);
      last = _mm512_permutex2var_epi64(a, _mm512_setr_epi64(2, 3, 6, 7, 10, 11, 14, 15), b);
    }
    at_.skip(active);
  }

  inline void unpack(int active, __m512i* words) {
    next(active, kFirstBytes.mask[active], words[0], words[1]);
  }

 private:
  ValueStream<kValues> at_;
  unstructured::CodeTable<kValues> table_;
};

// Weights that were unpacked before.
struct Unpacked {
  const __m512i* words;
  inline void next(int, __mmask64, __m512i& first, __m512i& last) {
    first = words[0];
    last = words[1];
    words += 2;
  }
};

struct Avx512Level {
  using Word = __m512i;
  using Unpacked = sell::Unpacked;
  template <Values kValues>
  using Weights = sell::Weights<kValues>;
  static constexpr int kStepWords = 2, kTogether = 4;
  static constexpr bool kDifferences = false;

  template <class Simd, int kTokens, class Source>
  static inline void multiply(const Block& block, Source source, const uint8_t* x, float* out,
                              int64_t out_stride, const float* scales) {
    using Vector = typename Simd::Vector;
    __m512i table[kTokens][4];
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) table[t][i] = _mm512_load_si512(x + t * kTableBytes + 64 * i);
    }
    Vector acc[kSlices][kTokens][2];
    const uint8_t* active = block.active;
    const uint8_t* columns = block.columns;
#pragma GCC unroll 2
    for (int s = 0; s < kSlices; ++s) {
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) acc[s][t][0] = acc[s][t][1] = Simd::zero();
      for (int j = block.header->steps[s]; j > 0; --j) {
        const int rows = *active++;
        const __mmask64 bytes = kFirstBytes.mask[rows];
        const __m512i at = _mm512_loadu_si512(columns);
        columns += 2 * rows;
        __m512i first, last;
        source.next(rows, bytes, first, last);
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) {
          const __m512i low = _mm512_maskz_permutex2var_epi8(bytes, table[t][0], at, table[t][1]);
          const __m512i high = _mm512_maskz_permutex2var_epi8(bytes, table[t][2], at, table[t][3]);
          acc[s][t][0] = Simd::two_entries(first, _mm512_unpacklo_epi8(low, high), acc[s][t][0]);
          acc[s][t][1] = Simd::two_entries(last, _mm512_unpackhi_epi8(low, high), acc[s][t][1]);
        }
      }
    }
    const auto bits = [](Vector v) {
      if constexpr (Simd::kInteger) {
        return v;
      } else {
        return _mm512_castps_si512(v);
      }
    };
#pragma GCC unroll 4
    for (int quarter = 0; quarter < kStripRows; quarter += 16) {
      const __m512i rank = _mm512_cvtepu8_epi32(
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(block.header->rank + quarter)));
      const __mmask16 upper = _mm512_test_epi32_mask(rank, _mm512_set1_epi32(kSliceRows));
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) {
        const __m512i low = _mm512_permutex2var_epi32(bits(acc[0][t][0]), rank, bits(acc[0][t][1]));
        const __m512i high = _mm512_permutex2var_epi32(bits(acc[1][t][0]), rank, bits(acc[1][t][1]));
        const __m512i mine = _mm512_mask_blend_epi32(upper, low, high);
        float* to = out + t * out_stride + quarter;
        if constexpr (Simd::kInteger) {
          const __m512 sums = _mm512_cvtepi32_ps(mine);
          _mm512_storeu_ps(to, _mm512_fmadd_ps(sums, _mm512_loadu_ps(scales + quarter), _mm512_loadu_ps(to)));
        } else {
          _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), _mm512_castsi512_ps(mine)));
        }
      }
    }
  }
};

}  // namespace
}  // namespace sparse_backend::sell

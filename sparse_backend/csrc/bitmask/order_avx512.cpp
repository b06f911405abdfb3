// Strip order with AVX-512: rows are expanded to dense ones, transposed 16 x 16 lanes at a time, and each
// mask's weights compressed. 17408 x 5120 at 50% zeros on one thread of Zen 5: 20 ms, without AVX-512 150 ms.
#include <immintrin.h>

#include "avx512_expand.h"
#include "order.h"

namespace sparse_backend::bitmask {
namespace {

// v[i], lane j <-> v[j], lane i, of 16 vectors of 16 lanes.
inline void transpose(__m512i v[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // v[4 q + j]: lanes 4 l + j of rows 4 q .. 4 q + 3, for the four 128-bit lanes l.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i a = _mm512_shuffle_i32x4(v[j], v[4 + j], 0x88),
                  b = _mm512_shuffle_i32x4(v[j], v[4 + j], 0xDD);
    const __m512i c = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0xDD);
    t[j] = _mm512_shuffle_i32x4(a, c, 0x88);
    t[8 + j] = _mm512_shuffle_i32x4(a, c, 0xDD);
    t[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(b, d, 0xDD);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) v[i] = t[i];
}

// The weights of two columns a vector, [row][column] in each. Rows are read under a mask: past a row's last
// weight there may be no memory.
template <class Finish>
inline void each_half(const ChunkRows<uint16_t>& rows, const Finish& finish) {
  const uint16_t* values[kStripRows];
  for (int r = 0; r < kStripRows; ++r) values[r] = rows.values[r];
  for (int half = 0; half < 2; ++half) {
    __m512i v[kStripRows];
#pragma GCC unroll 16
    for (int r = 0; r < kStripRows; ++r) {
      const auto mask = static_cast<uint32_t>(rows.mask[r] >> (32 * half));
      const int count = __builtin_popcount(mask);
      const auto there = static_cast<__mmask32>((uint64_t{1} << count) - 1);
      v[r] = _mm512_maskz_expand_epi16(mask, _mm512_maskz_loadu_epi16(there, values[r]));
      values[r] += count;
    }
    transpose(v);
    finish(v, half);
  }
}

// Appends what is not zero; returns where.
inline uint32_t append(__m512i v, uint16_t*& out) {
  const __mmask32 stored = _mm512_test_epi16_mask(v, v);
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi16(stored, v));
  out += __builtin_popcount(stored);
  return stored;
}

int words(const ChunkRows<uint16_t>& rows, uint8_t* masks, uint16_t* out) {
  const uint16_t* first = out;
  each_half(rows, [&](const __m512i v[], int half) {
#pragma GCC unroll 16
    for (int p = 0; p < 16; ++p) {
      const uint32_t bits = append(v[p], out);
      std::memcpy(masks + 64 * half + 4 * p, &bits, sizeof(bits));
    }
  });
  return static_cast<int>(out - first);
}

int coded(const ChunkRows<uint16_t>& rows, uint8_t* masks, uint16_t* out) {
  const uint16_t* first = out;
  each_half(rows, [&](const __m512i v[], int half) {
#pragma GCC unroll 8
    for (int q = 0; q < 8; ++q) {  // 128-bit lanes of two vectors in turn
      const __m512i a = v[2 * q], b = v[2 * q + 1];
      const uint64_t low =
          append(_mm512_permutex2var_epi64(a, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), b), out);
      const uint64_t high =
          append(_mm512_permutex2var_epi64(a, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), b), out);
      const uint64_t bits = low | high << 32;
      std::memcpy(masks + 64 * half + 8 * q, &bits, sizeof(bits));
    }
  });
  return static_cast<int>(out - first);
}

int bytes(const ChunkRows<int8_t>& rows, uint8_t* masks, int8_t* out) {
  const int8_t* first = out;
  __m512i v[kStripRows], stored[kStripRows];  // a code may be zero: masks are transposed as well
#pragma GCC unroll 16
  for (int r = 0; r < kStripRows; ++r) {
    const uint64_t mask = rows.mask[r];
    const int count = __builtin_popcountll(mask);
    const auto there = static_cast<__mmask64>(count == 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1);
    v[r] = _mm512_maskz_expand_epi8(mask, _mm512_maskz_loadu_epi8(there, rows.values[r]));
    stored[r] = _mm512_movm_epi8(mask);
  }
  transpose(v);
  transpose(stored);
#pragma GCC unroll 16
  for (int q = 0; q < 16; ++q) {
    const uint64_t bits = _mm512_movepi8_mask(stored[q]);
    std::memcpy(masks + 8 * q, &bits, sizeof(bits));
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi8(bits, v[q]));
    out += __builtin_popcountll(bits);
  }
  return static_cast<int>(out - first);
}

}  // namespace

const OrderKernels& avx512_order_kernels() {
  static constexpr OrderKernels kernels{words, coded, bytes};
  return kernels;
}

}  // namespace sparse_backend::bitmask

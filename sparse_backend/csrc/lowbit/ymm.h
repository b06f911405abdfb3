// What AVX2 and AVX-VNNI share: a line is two 32-byte registers, and how its codes are taken out.
#pragma once

#include <immintrin.h>

#include "kernel_impl.h"

namespace sparse_backend::lowbit {
namespace {

struct Ymm {
  static constexpr int kParts = 2;
  using Reg = __m256i;

  static inline Reg load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const Reg*>(p)); }
  template <class T>
  static inline void store(T* p, Reg v) {
    _mm256_storeu_si256(reinterpret_cast<Reg*>(p), v);
  }
  static inline Reg zero() { return _mm256_setzero_si256(); }
  static inline Reg add(Reg a, Reg b) { return _mm256_add_epi32(a, b); }
  static inline Reg broadcast(const int8_t* x) {
    int32_t dword;
    std::memcpy(&dword, x, sizeof(dword));
    return pinned(_mm256_set1_epi32(dword));
  }
  // Keeps instructions in the order they are written. GCC would load every broadcast of a loop
  // first and spill the sums: that cost a third of the speed of `gemm`.
  static inline Reg pinned(Reg v) {
    __asm__ volatile("" : "+x"(v));
    return v;
  }

  template <int kSlot>
  static inline Reg code2(Reg line) {
    const Reg low = kSlot == 0 ? line : _mm256_srli_epi16(line, 2 * kSlot);
    return _mm256_and_si256(low, _mm256_set1_epi8(3));
  }

  // value mod `unit`, for value < 3 * unit: what goes below zero wraps to something larger.
  static inline Reg modulo(Reg value, int unit) {
    const Reg u = _mm256_set1_epi8(static_cast<char>(unit));
    value = _mm256_min_epu8(value, _mm256_sub_epi8(value, u));
    return _mm256_min_epu8(value, _mm256_sub_epi8(value, u));
  }

  // The top trit is peeled off as a multiple of its unit, and one byte table makes that 0, 1 or 2:
  // the low four bits of 3, 9, 27 and of 6, 18, 54 tell them apart. (81 and 162 by their top bits.)
  static inline void codes5(Reg line, Reg out[5]) {
    const Reg table =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 0, 2, 1, 0, 0, 2, 0, 0, 1, 0, 1, 0, 0, 0, 0));
    const Reg four = modulo(line, 81);
    out[4] = _mm256_and_si256(_mm256_srli_epi16(_mm256_sub_epi8(line, four), 6), _mm256_set1_epi8(3));
    const Reg three = modulo(four, 27);
    out[3] = _mm256_shuffle_epi8(table, _mm256_sub_epi8(four, three));
    const Reg two = modulo(three, 9);
    out[2] = _mm256_shuffle_epi8(table, _mm256_sub_epi8(three, two));
    out[0] = modulo(two, 3);
    out[1] = _mm256_shuffle_epi8(table, _mm256_sub_epi8(two, out[0]));
  }
};

}  // namespace
}  // namespace sparse_backend::lowbit

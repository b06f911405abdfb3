// AVX-512 VNNI: a line is one register, a code's dot product one instruction.
#pragma once

#include <immintrin.h>

#include "../dot_avx512.h"
#include "kernel_impl.h"

namespace sparse_backend::lowbit {
namespace {

// Four 2-bit codes, one per trit, for every value below 81; the rest of the 128 is never looked up.
struct TritTable {
  alignas(64) uint8_t codes[128];
  constexpr TritTable() : codes() {
    for (int value = 0; value < 81; ++value) {
      codes[value] =
          static_cast<uint8_t>((value % 3) | (value / 3 % 3) << 2 | (value / 9 % 3) << 4 | (value / 27) << 6);
    }
  }
};
constexpr TritTable kTrits;

struct Zmm {
  static constexpr int kParts = 1;
  static constexpr int kGemvRows = 8, kGemvPasses = 4;
  static constexpr int slot_sums(int rows) { return rows <= 4 ? 4 : rows <= 8 ? 2 : 1; }
  static constexpr int kGemvPanels = 2;
  static constexpr int kTilePanels = 2, kGemmTile = 12;
  static constexpr int64_t kLines2 = kMaxColumns, kLines5 = kMaxColumns, kSteps = kMaxColumns;
  static constexpr int kInt8Offset = 128;
  using Reg = __m512i;

  static inline Reg load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  template <class T>
  static inline void store(T* p, Reg v) {
    _mm512_storeu_si512(p, v);
  }
  static inline Reg zero() { return _mm512_setzero_si512(); }
  static inline Reg add(Reg a, Reg b) { return _mm512_add_epi32(a, b); }
  static inline Reg broadcast(const int8_t* x) {
    int32_t dword;
    std::memcpy(&dword, x, sizeof(dword));
    return _mm512_set1_epi32(dword);
  }
  static inline Reg bits(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }

  template <int kSlot>
  static inline Reg code2(Reg line) {
    return _mm512_and_si512(kSlot == 0 ? line : _mm512_srli_epi16(line, 2 * kSlot), bits(3));
  }
  static inline Reg dot(Reg sum, Reg codes, Reg x) { return dot_bytes(sum, codes, x); }
  static inline Reg widen(Reg total, Reg sum) { return add(total, sum); }
  static inline Reg dot8(Reg total, Reg line, Reg x) { return dot(total, line, x); }

  // The top trit, 0, 64 or 128, is what taking 81 off leaves in the top bits (81 and 162 cut
  // off); the other four become 2-bit codes through a table of 81.
  static inline Reg split5(Reg line, Reg& top) {
    Reg rest = _mm512_min_epu8(line, _mm512_sub_epi8(line, bits(81)));
    rest = _mm512_min_epu8(rest, _mm512_sub_epi8(rest, bits(81)));
    top = _mm512_and_si512(_mm512_sub_epi8(line, rest), bits(0xC0));
    return _mm512_permutex2var_epi8(_mm512_load_si512(kTrits.codes), rest,
                                    _mm512_load_si512(kTrits.codes + 64));
  }
  static inline void codes5(Reg line, Reg out[5]) {
    Reg top;
    const Reg four = split5(line, top);
    out[0] = code2<0>(four);
    out[1] = code2<1>(four);
    out[2] = code2<2>(four);
    out[3] = code2<3>(four);
    out[4] = code2<3>(top);
  }

  // Codes stay where they are in the byte; each slot has a sum of its own, shifted at the end.
  struct Single {
    static constexpr int64_t kLines2 = kMaxColumns, kLines5 = kMaxColumns;
    Reg slot[4];

    inline void clear() {
      for (Reg& sum : slot) sum = zero();
    }
    inline void four(Reg line, const int8_t* x) {
#pragma GCC unroll 4
      for (int s = 0; s < 4; ++s) {
        slot[s] = dot(slot[s], _mm512_and_si512(line, bits(3 << (2 * s))), broadcast(x + 4 * s));
      }
    }
    inline void line2(const uint8_t* w, const int8_t* x) { four(load(w), x); }
    inline void line5(const uint8_t* w, const int8_t* x) {
      Reg top;
      four(split5(load(w), top), x);
      slot[3] = dot(slot[3], top, broadcast(x + 16));
    }
    inline void flush(Reg total[kParts]) {
#pragma GCC unroll 4
      for (int s = 0; s < 4; ++s)
        total[0] = add(total[0], _mm512_srai_epi32(slot[s], static_cast<unsigned>(2 * s)));
      clear();
    }
  };
};

}  // namespace
}  // namespace sparse_backend::lowbit

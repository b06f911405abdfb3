// What both AVX-512 levels share: decoding a mask and its run, and the shape of their register tiles.
//
// vpexpandw and vpexpandb with their destination zeroed first. On Zen 5 the zero-masking form still waits
// for the register's old value: 5 cycles each in one register, 1 after a vpxord of it,
// which the renamer resolves. Compilers neither know nor write that, hence the assembly.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "../unstructured/decode_avx512.h"
#include "layout.h"

namespace sparse_backend::bitmask {
namespace {

using unstructured::broadcast_dword;
using unstructured::CodeTable;

// The first popcount(mask) words of `packed`, each moved to the position of its mask bit; zeros elsewhere.
inline __m512i expand_words(uint32_t mask, __m512i packed) {
#if defined(SPARSE_BACKEND_EMULATE_AVX512)
  return _mm512_maskz_expand_epi16(mask, packed);
#else
  __m512i expanded;
  __asm__("vpxord %0, %0, %0\n\tvpexpandw %2, %0 %{%1%}%{z%}"
          : "=&v"(expanded)
          : "Yk"(static_cast<__mmask32>(mask)), "v"(packed));
  return expanded;
#endif
}

// The same of bytes.
inline __m512i expand_bytes(uint64_t mask, __m512i packed) {
#if defined(SPARSE_BACKEND_EMULATE_AVX512)
  return _mm512_maskz_expand_epi8(mask, packed);
#else
  __m512i expanded;
  __asm__("vpxord %0, %0, %0\n\tvpexpandb %2, %0 %{%1%}%{z%}"
          : "=&v"(expanded)
          : "Yk"(static_cast<__mmask64>(mask)), "v"(packed));
  return expanded;
#endif
}

// Mask i and its run as vectors of 16 rows x 2 columns of 16-bit floats: one, or of kBf16x12 two. Coded
// values are expanded as bytes, low and high ones apart: decoding a chunk's runs to words first, and
// expanding those, took half as long again (17408 x 5120, 75% zeros, one thread of Zen 5: 2.6 ms).
template <Values kValues>
[[gnu::always_inline]] inline void next_pairs(const uint8_t* masks, int i, const uint8_t*& run,
                                              const CodeTable<kValues>& table, __m512i out[]) {
  if constexpr (kValues == Values::kBf16x12) {
    uint64_t mask;
    std::memcpy(&mask, masks + 8 * i, sizeof(mask));
    const int count = __builtin_popcountll(mask);
    const __m512i low = expand_bytes(mask, _mm512_loadu_si512(run));
    const __m512i high = expand_bytes(mask, table.look_up(run + count));
    const __m512i first = _mm512_unpacklo_epi8(low, high), last = _mm512_unpackhi_epi8(low, high);
    out[0] = _mm512_shrdi_epi16(first, first, 1);
    out[1] = _mm512_shrdi_epi16(last, last, 1);
    run += unstructured::run_bytes(kValues, count);
  } else {
    uint32_t mask;
    std::memcpy(&mask, masks + 4 * i, sizeof(mask));
    out[0] = expand_words(mask, _mm512_loadu_si512(run));
    run += 2 * __builtin_popcount(mask);
  }
}

// Mask i and its run as 16 rows x 4 columns of int8.
template <Values kValues>
[[gnu::always_inline]] inline __m512i next_bytes(const uint8_t* masks, int i, const uint8_t*& run,
                                                 const CodeTable<kValues>& table) {
  uint64_t mask;
  std::memcpy(&mask, masks + 8 * i, sizeof(mask));
  const __m512i packed = kValues == Values::kInt4 ? table.look_up(run) : _mm512_loadu_si512(run);
  run += unstructured::run_bytes(kValues, __builtin_popcountll(mask));
  return expand_bytes(mask, packed);
}

// Tiles of 2 strips x 12 tokens reach 0.95 of the machine's dot products on Zen 5, of 4 x 6 0.87. A batched
// kernel that multiplies only the pairs of columns of which a row stores one (tokens in lanes, lists of
// pairs, two rows side by side) gained 5% at 75% zeros from 128 tokens on, lost below, and was behind sell's
// at 90%: it was left out.
template <Values kKind>
struct Avx512Shape {
  static constexpr Values kValues = kKind;
  static constexpr int kSums = 1, kVectorBytes = 64;
  static constexpr bool kOffset = false;
  static constexpr int kGemvTokens = 8, kGemvTiles = 3, kTileStrips = 2, kGemmTile = 12, kTileStep = 4;
  static constexpr int streams(int tokens) { return tokens <= 4 ? 4 : 2; }
  static constexpr int sum_of(int) { return 0; }
  using Table = CodeTable<kKind>;
};

}  // namespace
}  // namespace sparse_backend::bitmask

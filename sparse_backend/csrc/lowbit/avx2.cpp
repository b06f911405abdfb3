// AVX2 has no 8-bit dot product into 32 bits: vpmaddubsw adds pairs into 16 bits, and a few
// lines' worth of codes fit there before they are widened. Two slots share a shift: codes
// times 4 are summed apart. Compiled with -mavx2 -mfma -mf16c -mpopcnt; called only where
// cpu_features() found all four.
#include "ymm.h"

namespace sparse_backend::lowbit {
namespace {

struct Avx2 : Ymm {
  static constexpr int kGemvRows = 4, kGemvPasses = 1;
  static constexpr int slot_sums(int rows) { return rows == 1 ? 2 : 1; }
  static constexpr int kGemvPanels = 1;
  static constexpr int kTilePanels = 1, kGemmTile = 6;
  // A code is at most 2, an activation at least -128: a line adds four pairs, 2048, to a 16-bit lane.
  static constexpr int64_t kLines2 = 16;
  static constexpr int64_t kLines5 = 12;
  static constexpr int64_t kSteps = 64;
  static constexpr int kInt8Offset = 0;

  static inline Reg dot(Reg sum, Reg codes, Reg x) {
    return pinned(_mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, x)));
  }
  static inline Reg widen(Reg total, Reg sum) {
    return _mm256_add_epi32(total, _mm256_madd_epi16(sum, _mm256_set1_epi16(1)));
  }
  // |w| times sign(w) x: pairs reach 127 * 128 * 2, which fits, where codes up to 255 would not.
  // Limbs of int8 layers are at least -127, so the sign can be moved.
  static inline Reg dot8(Reg total, Reg line, Reg x) {
    const Reg weight = _mm256_xor_si256(line, _mm256_set1_epi8(static_cast<char>(0x80)));
    const Reg pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weight), _mm256_sign_epi8(x, weight));
    return widen(total, pairs);
  }

  struct Single {
    // Eight lines put 2 * 8 pairs of codes times 4 into a 16-bit lane: at most 2048 each.
    static constexpr int64_t kLines2 = 8;
    static constexpr int64_t kLines5 = 12;
    Reg ones[kParts], fours[kParts];

    inline void clear() {
      for (int p = 0; p < kParts; ++p) ones[p] = fours[p] = zero();
    }
    inline void line2(const uint8_t* w, const int8_t* x) {
      const Reg mask1 = _mm256_set1_epi8(0x03), mask4 = _mm256_set1_epi8(0x0C);
#pragma GCC unroll 2
      for (int p = 0; p < kParts; ++p) {
        const Reg low = load(w + 32 * p);
        const Reg high = _mm256_srli_epi16(low, 4);
        ones[p] = dot(ones[p], _mm256_and_si256(low, mask1), broadcast(x));
        fours[p] = dot(fours[p], _mm256_and_si256(low, mask4), broadcast(x + 4));
        ones[p] = dot(ones[p], _mm256_and_si256(high, mask1), broadcast(x + 8));
        fours[p] = dot(fours[p], _mm256_and_si256(high, mask4), broadcast(x + 12));
      }
    }
    inline void line5(const uint8_t* w, const int8_t* x) {
#pragma GCC unroll 2
      for (int p = 0; p < kParts; ++p) {
        Reg codes[5];
        codes5(load(w + 32 * p), codes);
#pragma GCC unroll 5
        for (int slot = 0; slot < 5; ++slot) ones[p] = dot(ones[p], codes[slot], broadcast(x + 4 * slot));
      }
    }
    inline void flush(Reg total[kParts]) {
      for (int p = 0; p < kParts; ++p) {
        total[p] = widen(total[p], _mm256_add_epi16(ones[p], _mm256_srai_epi16(fours[p], 2)));
      }
      clear();
    }
  };
};

}  // namespace

const Kernels& avx2_kernels() {
  static constexpr Kernels kernels = make_kernels<Avx2>("avx2");
  return kernels;
}

}  // namespace sparse_backend::lowbit

// AVX-VNNI: 32-byte registers with vpdpbusd, on processors without AVX-512 (Alder Lake and later
// desktop parts). Compiled with AVX2's flags and -mavxvnni.
#include "ymm.h"

namespace sparse_backend::lowbit {
namespace {

struct AvxVnni : Ymm {
  static constexpr int kGemvRows = 4, kGemvPasses = 1;
  static constexpr int slot_sums(int rows) { return rows == 1 ? 2 : 1; }
  static constexpr int kGemvPanels = 1;
  static constexpr int kTilePanels = 1, kGemmTile = 6;
  static constexpr int64_t kLines2 = kMaxColumns, kLines5 = kMaxColumns, kSteps = kMaxColumns;
  static constexpr int kInt8Offset = 128;

  static inline Reg dot(Reg sum, Reg codes, Reg x) { return pinned(_mm256_dpbusd_avx_epi32(sum, codes, x)); }
  static inline Reg widen(Reg total, Reg sum) { return add(total, sum); }
  static inline Reg dot8(Reg total, Reg line, Reg x) { return dot(total, line, x); }

  // Codes stay where they are in the byte; each slot has a sum of its own, shifted at the end.
  struct Single {
    static constexpr int64_t kLines2 = kMaxColumns, kLines5 = kMaxColumns;
    Reg slot[4][kParts];

    inline void clear() {
      for (auto& parts : slot) {
        for (Reg& sum : parts) sum = zero();
      }
    }
    inline void line2(const uint8_t* w, const int8_t* x) {
#pragma GCC unroll 2
      for (int p = 0; p < kParts; ++p) {
        const Reg line = load(w + 32 * p);
#pragma GCC unroll 4
        for (int s = 0; s < 4; ++s) {
          const Reg codes = _mm256_and_si256(line, _mm256_set1_epi8(static_cast<char>(3 << (2 * s))));
          slot[s][p] = dot(slot[s][p], codes, broadcast(x + 4 * s));
        }
      }
    }
    inline void line5(const uint8_t* w, const int8_t* x) {
#pragma GCC unroll 2
      for (int p = 0; p < kParts; ++p) {
        Reg codes[5];
        codes5(load(w + 32 * p), codes);
#pragma GCC unroll 5
        for (int s = 0; s < 5; ++s) slot[0][p] = dot(slot[0][p], codes[s], broadcast(x + 4 * s));
      }
    }
    inline void flush(Reg total[kParts]) {
      for (int p = 0; p < kParts; ++p) {
        for (int s = 0; s < 4; ++s) total[p] = add(total[p], _mm256_srai_epi32(slot[s][p], 2 * s));
      }
      clear();
    }
  };
};

}  // namespace

const Kernels& avx_vnni_kernels() {
  static constexpr Kernels kernels = make_kernels<AvxVnni>("avx_vnni");
  return kernels;
}

}  // namespace sparse_backend::lowbit

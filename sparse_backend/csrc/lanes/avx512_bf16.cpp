// AVX-512 BF16: two columns of words are the operand of vdpbf16ps as they stand.
// Compiled with avx512.cpp's flags and -mavx512bf16.
#include "avx512_words.h"
#include "kernel_impl.h"

namespace sparse_backend::lanes {
namespace {

template <Values kKind>
struct Avx512Bf16 {
  static constexpr Values kValues = kKind;
  static constexpr int kParts = 1, kSums = 2, kGemvTokens = 8, kGemvTiles = 4, kOffset = 0;
  static constexpr int kTileStrips = 2, kGemmTile = 6, kGemmSums = kSums;
  static constexpr int kPer = kKind == Values::kBf16x12 ? 2 : 1;
  static constexpr int kSteps = kBlockColumns / 2 / kPer;
  static constexpr int streams(int tokens) { return tokens <= 2 ? 4 : tokens <= 4 ? 2 : 1; }
  using Element = uint16_t;
  using Operand = __m512i;
  using Accumulator = __m512;
  using Sum = __m512;
  using Table = WordTable<kKind>;

  template <int kStep>
  static inline void decode(const uint8_t* run, const Table& table, Operand out[kPer][kParts]) {
    table.template words<kStep>(run, out[0]);
  }
  static inline Operand load(const uint8_t* p) { return _mm512_load_si512(p); }
  static inline void store(uint8_t* p, Operand v) { _mm512_store_si512(p, v); }
  static inline Accumulator zero() { return _mm512_setzero_ps(); }
  static inline __m512i broadcast(const uint8_t* x) { return broadcast_dword(x); }
  static inline Accumulator multiply_add(Operand w, __m512i x, Accumulator acc) {
    return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)x);
  }
  static inline Accumulator add_sums(Accumulator a, Accumulator b) { return _mm512_add_ps(a, b); }
  static inline void store_floats(float* out, int, Accumulator v) { _mm512_store_ps(out, v); }
};

}  // namespace

const Kernels& avx512_bf16_kernels(Values values) {
  static constexpr Kernels plain = make_kernels<Avx512Bf16<Values::kBf16>>("avx512_bf16");
  static constexpr Kernels coded = make_kernels<Avx512Bf16<Values::kBf16x12>>("avx512_bf16");
  return values == Values::kBf16 ? plain : coded;
}

}  // namespace sparse_backend::lanes

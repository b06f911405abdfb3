// AVX-512 with VBMI2 and BF16: an expanded mask, 16 rows of two columns, is itself the operand of
// vdpbf16ps. Compiled with avx512.cpp's flags and -mavx512bf16.
#include "avx512_expand.h"
#include "kernel_impl.h"

namespace sparse_backend::bitmask {
namespace {

template <Values kKind>
struct Avx512Bf16 : Avx512Shape<kKind> {
  static constexpr int kOperands = mask_columns(kKind) / 2, kBroadcasts = kOperands;
  static constexpr bool kReorder = false;
  using Element = uint16_t;
  using Operand = __m512i;
  using Accumulator = __m512;
  using Rows = __m512;
  using Sums = __m512;

  static inline void decode(const uint8_t* masks, int i, const uint8_t*& run, const CodeTable<kKind>& table,
                            Operand out[kOperands]) {
    next_pairs<kKind>(masks, i, run, table, out);
  }
  static inline __m512i broadcast(const uint8_t* x) { return broadcast_dword(x); }
  static inline Operand load(const uint8_t* p) { return _mm512_load_si512(p); }
  static inline void store(uint8_t* p, Operand v) { _mm512_store_si512(p, v); }
  static inline Accumulator zero() { return _mm512_setzero_ps(); }
  static inline Accumulator multiply_add(Operand w, __m512i x, Accumulator acc) {
    return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)x);
  }
  static inline Rows rows(const Accumulator acc[]) { return acc[0]; }
  static inline Sums no_sums() { return zero(); }
  static inline void store_rows(float* out, Rows v) { _mm512_store_ps(out, v); }
};

}  // namespace

const Kernels& avx512_bf16_kernels(Values values) {
  static constexpr Kernels plain = make_kernels<Avx512Bf16<Values::kBf16>>("avx512_bf16");
  static constexpr Kernels coded = make_kernels<Avx512Bf16<Values::kBf16x12>>("avx512_bf16");
  return values == Values::kBf16 ? plain : coded;
}

}  // namespace sparse_backend::bitmask

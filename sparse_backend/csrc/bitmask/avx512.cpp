// AVX-512 with VBMI2 and VNNI. Float arithmetic for fp16 values, and for bf16 values where the
// machine has no BF16 instructions or the activations are not bf16; vpdpwssd for integer values.
// Compiled with -mavx512{f,bw,dq,vl,vbmi,vbmi2,vnni} and the AVX2 flags.
#include "avx512_expand.h"
#include "kernel_impl.h"

namespace sparse_backend::bitmask {
namespace {

// A mask's columns, sixteen floats each.
template <Values kKind>
struct Avx512 : Avx512Shape<kKind> {
  static constexpr int kOperands = mask_columns(kKind), kBroadcasts = kOperands;
  static constexpr bool kReorder = false;
  using Element = float;
  using Operand = __m512;
  using Accumulator = __m512;
  using Rows = __m512;
  using Sums = __m512;

  static inline void decode(const uint8_t* masks, int i, const uint8_t*& run, const CodeTable<kKind>& table,
                            Operand out[kOperands]) {
    __m512i pairs[kOperands / 2];
    next_pairs<kKind>(masks, i, run, table, pairs);
#pragma GCC unroll 2
    for (int p = 0; p < kOperands / 2; ++p) {
      const __m512i both = pairs[p];
      if constexpr (kKind != Values::kFp16) {
        const __m512i high = _mm512_set1_epi32(static_cast<int>(0xFFFF0000U));
        out[2 * p] = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
        out[2 * p + 1] = _mm512_castsi512_ps(_mm512_and_si512(both, high));
      } else {
        out[2 * p] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(both));
        out[2 * p + 1] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16)));
      }
    }
  }
  static inline __m512 broadcast(const uint8_t* x) {
    return _mm512_set1_ps(*reinterpret_cast<const float*>(x));
  }
  static inline Operand load(const uint8_t* p) { return _mm512_load_ps(p); }
  static inline void store(uint8_t* p, Operand v) { _mm512_store_ps(reinterpret_cast<float*>(p), v); }
  static inline Accumulator zero() { return _mm512_setzero_ps(); }
  static inline Accumulator multiply_add(Operand w, __m512 x, Accumulator acc) {
    return _mm512_fmadd_ps(w, x, acc);
  }
  static inline Rows rows(const Accumulator acc[]) { return acc[0]; }
  static inline Sums no_sums() { return zero(); }
  static inline void store_rows(float* out, Rows v) { _mm512_store_ps(out, v); }
};

// Integer values: a mask's four columns are placed at once as bytes; its even columns widened, then
// its odd ones, are operands of a dot product with activations in the order 0, 2, 1, 3.
template <Values kKind>
struct Avx512Integer : Avx512Shape<kKind> {
  static constexpr int kOperands = 2, kBroadcasts = 2;
  static constexpr bool kReorder = true;
  using Element = int16_t;
  using Operand = __m512i;
  using Accumulator = __m512i;
  using Rows = __m512i;
  using Sums = __m512;

  static inline void decode(const uint8_t* masks, int i, const uint8_t*& run, const CodeTable<kKind>& table,
                            Operand out[kOperands]) {
    const __m512i bytes = next_bytes<kKind>(masks, i, run, table);
    out[0] = _mm512_srai_epi16(_mm512_slli_epi16(bytes, 8), 8);
    out[1] = _mm512_srai_epi16(bytes, 8);
  }
  static inline __m512i broadcast(const uint8_t* x) { return broadcast_dword(x); }
  static inline Operand load(const uint8_t* p) { return _mm512_load_si512(p); }
  static inline void store(uint8_t* p, Operand v) { _mm512_store_si512(p, v); }
  static inline Accumulator zero() { return _mm512_setzero_si512(); }
  static inline Accumulator multiply_add(Operand w, __m512i x, Accumulator acc) {
    return _mm512_dpwssd_epi32(acc, w, x);
  }
  static inline Rows rows(const Accumulator acc[]) { return acc[0]; }
  static inline Sums no_sums() { return _mm512_setzero_ps(); }
  static inline Sums add_scaled(Sums sums, Rows rows, const float* scales) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(rows), _mm512_loadu_ps(scales), sums);
  }
  static inline void store_rows(float* out, Sums v) { _mm512_store_ps(out, v); }
};

}  // namespace

const Kernels& avx512_kernels(Values values) {
  return unstructured::kernel_table<Avx512, Avx512Integer>(
      values, [](auto simd) { return make_kernels<decltype(simd)>("avx512"); });
}

}  // namespace sparse_backend::bitmask

// AVX-512 with VBMI2 and VNNI. Float arithmetic for fp16 values, and for bf16 values where the
// machine has no BF16 instructions or the activations are not bf16; vpdpwssd for integer values.
// Compiled with -mavx512{f,bw,dq,vl,vbmi,vbmi2,vnni} and the AVX2 flags.
#include "../dot_avx512.h"
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
    return dot_words(acc, w, x);
  }
  static inline Rows rows(const Accumulator acc[]) { return acc[0]; }
  static inline Sums no_sums() { return _mm512_setzero_ps(); }
  static inline Sums add_scaled(Sums sums, Rows rows, const float* scales) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(rows), _mm512_loadu_ps(scales), sums);
  }
  static inline void store_rows(float* out, Sums v) { _mm512_store_ps(out, v); }
};

// The same with int8 activations: four columns' products at once, of bytes as they were expanded with
// activations that are 128 too large, as vpdpbusd wants one side without a sign.
template <Values kKind>
struct Avx512Bytes : Avx512Integer<kKind> {
  static constexpr int kOperands = 1, kBroadcasts = 1;
  static constexpr bool kReorder = false, kOffset = true;
  static constexpr int kMore = 128;
  using Element = uint8_t;

  static inline void decode(const uint8_t* masks, int i, const uint8_t*& run, const CodeTable<kKind>& table,
                            __m512i out[kOperands]) {
    out[0] = next_bytes<kKind>(masks, i, run, table);
  }
  static inline __m512i multiply_add(__m512i w, __m512i x, __m512i acc) { return dot_bytes(acc, x, w); }
  static inline __m512i offset_of(__m512i w, __m512i acc) {
    return multiply_add(w, _mm512_set1_epi8(static_cast<char>(kMore)), acc);
  }
  static inline __m512i minus(__m512i rows, __m512i offset) { return _mm512_sub_epi32(rows, offset); }

  static float prepare(const void* x, DType dtype, int64_t k, int limit, void* out) {
    // Quantised into the room of 16-bit words, then narrowed from the front.
    const float scale = unstructured::prepare_activations<int16_t>(x, dtype, k, kChunk, limit, out);
    const auto* words = static_cast<const uint8_t*>(out);
    auto* bytes = static_cast<uint8_t*>(out);
    for (int64_t i = 0; i < round_up(k, kChunk); ++i) bytes[i] = static_cast<uint8_t>(words[2 * i] + kMore);
    return scale;
  }
};

}  // namespace

const Kernels& avx512_byte_kernels(Values values) {
  static constexpr Kernels int8 = make_kernels<Avx512Bytes<Values::kInt8>>("avx512");
  static constexpr Kernels int4 = make_kernels<Avx512Bytes<Values::kInt4>>("avx512");
  return values == Values::kInt8 ? int8 : int4;
}

const Kernels& avx512_kernels(Values values) {
  return unstructured::kernel_table<Avx512, Avx512Integer>(
      values, [](auto simd) { return make_kernels<decltype(simd)>("avx512"); });
}

}  // namespace sparse_backend::bitmask

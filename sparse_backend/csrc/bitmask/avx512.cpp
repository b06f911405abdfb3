// AVX-512 with VBMI2 and VNNI. Float arithmetic for fp16 values, and for bf16 values where the
// machine has no BF16 instructions or the activations are not bf16; vpdpwssd for integer values.
// Compiled with -mavx512{f,bw,dq,vl,vbmi,vbmi2,vnni} and the AVX2 flags.
#include "../unstructured/decode_avx512.h"
#include "avx512_expand.h"
#include "kernel_impl.h"

namespace sparse_backend::bitmask {
namespace {

// A decoded block is 32 columns in two vectors of sixteen floats. bf16: the even columns
// and the odd ones; fp16: the first sixteen and the last sixteen.
template <Values kKind>
struct Avx512 {
  static constexpr Values kValues = kKind;
  using Decoder = unstructured::Avx512Decoder;
  using Stored = uint16_t;
  static constexpr int kBlock = 32;
  static constexpr int kParts = 2;
  static constexpr int kElements = 16;
  static constexpr int kGemvTokens = 8;
  static constexpr int kGemmTile = 6;
  using Element = float;
  using Masks = MaskWords;
  using Operand = __m512;
  using Accumulator = __m512;

  static constexpr int rows_at_once(int tokens) { return tokens <= 4 ? 4 : 2; }

  static inline void decode(const Masks& masks, int row, int block, const uint16_t*& values,
                            Operand out[kParts]) {
    const auto mask = static_cast<uint32_t>(masks.mask[row] >> (block * kBlock));
    const __m512i both = expand32(mask, values);
    if constexpr (kKind != Values::kFp16) {
      out[0] = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
      out[1] = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xFFFF0000U))));
    } else {
      out[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(both));
      out[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(both, 1));
    }
  }

  static inline Operand load(const float* p) { return _mm512_load_ps(p); }
  static inline void store(float* p, Operand v) { _mm512_store_ps(p, v); }
  static inline Accumulator zero() { return _mm512_setzero_ps(); }
  static inline Accumulator multiply_add(Operand w, Operand x, Accumulator acc) {
    return _mm512_fmadd_ps(w, x, acc);
  }
  static inline float reduce(Accumulator acc) { return _mm512_reduce_add_ps(acc); }

  static inline void prepare_block(const uint8_t* x, DType dtype, float* out) {
    if constexpr (kKind != Values::kFp16) {
      if (dtype == DType::kBf16) {
        const __m512i both = _mm512_loadu_si512(x);
        const __m512i odd = _mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xFFFF0000U)));
        _mm512_store_ps(out, _mm512_castsi512_ps(_mm512_slli_epi32(both, 16)));
        _mm512_store_ps(out + 16, _mm512_castsi512_ps(odd));
        return;
      }
      for (int i = 0; i < kBlock; ++i) out[(i & 1) * 16 + i / 2] = load_as_float(x, dtype, i);
    } else {
      for (int i = 0; i < kBlock; ++i) out[i] = load_as_float(x, dtype, i);
    }
  }
};

// Integer values: 64 bytes are placed at once, widened, and are operands of a dot product.
template <Values kKind>
struct Avx512Integer {
  static constexpr Values kValues = kKind;
  using Decoder = unstructured::Avx512Decoder;
  using Stored = uint8_t;
  static constexpr int kBlock = 64;
  static constexpr int kParts = 2;
  static constexpr int kElements = 32;
  static constexpr int kGemvTokens = 8;
  static constexpr int kGemmTile = 6;
  using Element = int16_t;
  using Masks = MaskWords;
  using Operand = __m512i;
  using Accumulator = __m512i;
  using Sum = __m512;

  static constexpr int rows_at_once(int tokens) { return tokens <= 4 ? 4 : 2; }

  static inline void decode(const Masks& masks, int row, int, const uint8_t*& values, Operand out[kParts]) {
    const __m512i bytes = expand64(masks.mask[row], values);
    out[0] = _mm512_cvtepi8_epi16(_mm512_castsi512_si256(bytes));
    out[1] = _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(bytes, 1));
  }

  static inline Operand load(const int16_t* p) { return _mm512_load_si512(p); }
  static inline void store(int16_t* p, Operand v) { _mm512_store_si512(p, v); }
  static inline Accumulator zero() { return _mm512_setzero_si512(); }
  static inline Sum zero_sum() { return _mm512_setzero_ps(); }
  static inline Accumulator multiply_add(Operand w, Operand x, Accumulator acc) {
    return _mm512_dpwssd_epi32(acc, w, x);
  }
  static inline Sum add_scaled(Sum sum, Accumulator acc, float scale) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc), _mm512_set1_ps(scale), sum);
  }
  static inline float reduce(Sum sum) { return _mm512_reduce_add_ps(sum); }
};

}  // namespace

const Kernels& avx512_kernels(Values values) { return pick_kernels<Avx512, Avx512Integer>(values, "avx512"); }

}  // namespace sparse_backend::bitmask

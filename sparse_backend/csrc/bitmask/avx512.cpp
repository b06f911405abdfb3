// AVX-512 with VBMI2 and float arithmetic: fp16 values, and bf16 values where the machine
// has no BF16 instructions or the activations are not bf16. Compiled with
// -mavx512{f,bw,dq,vl,vbmi2} and the AVX2 flags.
#include "avx512_expand.h"
#include "kernel_impl.h"

namespace sparse_backend::bitmask {
namespace {

// A decoded block is 32 columns in two vectors of sixteen floats. bf16: the even columns
// and the odd ones; fp16: the first sixteen and the last sixteen.
template <DType kValueType>
struct Avx512 {
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
    if constexpr (kValueType == DType::kBf16) {
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
    if constexpr (kValueType == DType::kBf16) {
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

}  // namespace

const Kernels& avx512_kernels(DType value_type) {
  static constexpr Kernels bf16 = make_kernels<Avx512<DType::kBf16>>("avx512");
  static constexpr Kernels fp16 = make_kernels<Avx512<DType::kFp16>>("avx512");
  return value_type == DType::kBf16 ? bf16 : fp16;
}

}  // namespace sparse_backend::bitmask

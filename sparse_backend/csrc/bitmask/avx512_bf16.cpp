// AVX-512 with VBMI2 and BF16: an expanded block is itself the operand of vdpbf16ps, so 32
// columns of a row cost one load, one population count, one expand and one dot product.
// Compiled with avx512.cpp's flags and -mavx512bf16.
#include "../unstructured/decode_avx512.h"
#include "avx512_expand.h"
#include "kernel_impl.h"

namespace sparse_backend::bitmask {
namespace {

template <Values kKind>
struct Avx512Bf16 {
  static constexpr Values kValues = kKind;
  using Decoder = unstructured::Avx512Decoder;
  using Stored = uint16_t;
  static constexpr int kBlock = 32;
  static constexpr int kParts = 1;
  static constexpr int kElements = 32;
  static constexpr int kGemvTokens = 8;
  static constexpr int kGemmTile = 6;
  using Element = uint16_t;
  using Masks = MaskWords;
  using Operand = __m512i;
  using Accumulator = __m512;

  static constexpr int rows_at_once(int tokens) { return tokens <= 4 ? 4 : 2; }

  static inline void decode(const Masks& masks, int row, int block, const uint16_t*& values,
                            Operand out[kParts]) {
    const auto mask = static_cast<uint32_t>(masks.mask[row] >> (block * kBlock));
    out[0] = expand32(mask, values);
  }

  static inline Operand load(const uint16_t* p) { return _mm512_load_si512(p); }
  static inline void store(uint16_t* p, Operand v) { _mm512_store_si512(p, v); }
  static inline Accumulator zero() { return _mm512_setzero_ps(); }
  static inline Accumulator multiply_add(Operand w, Operand x, Accumulator acc) {
    return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)x);
  }
  static inline float reduce(Accumulator acc) { return _mm512_reduce_add_ps(acc); }

  static inline void prepare_block(const uint8_t* x, DType dtype, uint16_t* out) {
    if (dtype == DType::kBf16) {
      _mm512_store_si512(out, _mm512_loadu_si512(x));
      return;
    }
    for (int i = 0; i < kBlock; ++i) out[i] = bf16_from_float(load_as_float(x, dtype, i));
  }
};

}  // namespace

const Kernels& avx512_bf16_kernels(Values values) {
  static constexpr Kernels plain = make_kernels<Avx512Bf16<Values::kBf16>>("avx512_bf16");
  static constexpr Kernels coded = make_kernels<Avx512Bf16<Values::kBf16x12>>("avx512_bf16");
  return values == Values::kBf16 ? plain : coded;
}

}  // namespace sparse_backend::bitmask

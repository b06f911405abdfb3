// Portable kernels: any processor, and the naive form of what the SIMD files do.
#include "kernel_impl.h"

namespace sparse_backend::bitmask {
namespace {

template <DType kValueType>
struct Scalar {
  static constexpr int kBlock = 8;
  static constexpr int kParts = 1;
  static constexpr int kElements = 8;
  static constexpr int kGemvTokens = 2;
  static constexpr int kGemmTile = 4;
  using Element = float;
  using Masks = MaskWords;
  struct Operand {
    float lane[kElements];
  };
  using Accumulator = Operand;

  static constexpr int rows_at_once(int tokens) { return tokens <= 2 ? 2 : 1; }

  static void decode(const Masks& masks, int row, int block, const uint16_t*& values, Operand out[kParts]) {
    const auto mask = static_cast<uint32_t>(masks.mask[row] >> (block * kBlock));
    for (int i = 0; i < kBlock; ++i) {
      const bool stored = (mask >> i) & 1U;
      const uint16_t bits = stored ? *values : uint16_t{0};
      values += stored;
      out[0].lane[i] = kValueType == DType::kBf16 ? float_from_bf16(bits) : float_from_fp16(bits);
    }
  }

  static Operand load(const float* p) {
    Operand v;
    std::memcpy(v.lane, p, sizeof(v.lane));
    return v;
  }
  static void store(float* p, const Operand& v) { std::memcpy(p, v.lane, sizeof(v.lane)); }
  static Accumulator zero() { return Accumulator{}; }

  static Accumulator multiply_add(const Operand& w, const Operand& x, Accumulator acc) {
    for (int i = 0; i < kElements; ++i) acc.lane[i] += w.lane[i] * x.lane[i];
    return acc;
  }

  static float reduce(const Accumulator& acc) {
    const float* v = acc.lane;
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
  }

  static void prepare_block(const uint8_t* x, DType dtype, float* out) {
    for (int i = 0; i < kBlock; ++i) out[i] = load_as_float(x, dtype, i);
  }
};

}  // namespace

const Kernels& scalar_kernels(DType value_type) {
  static constexpr Kernels bf16 = make_kernels<Scalar<DType::kBf16>>("scalar");
  static constexpr Kernels fp16 = make_kernels<Scalar<DType::kFp16>>("scalar");
  return value_type == DType::kBf16 ? bf16 : fp16;
}

}  // namespace sparse_backend::bitmask

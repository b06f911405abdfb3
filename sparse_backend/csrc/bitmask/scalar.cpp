// Portable kernels: any processor, and the naive form of what the SIMD files do.
#include "../unstructured/decode_scalar.h"
#include "kernel_impl.h"

namespace sparse_backend::bitmask {
namespace {

template <Values kKind>
struct Scalar {
  static constexpr Values kValues = kKind;
  using Decoder = unstructured::ScalarDecoder;
  using Stored = uint16_t;
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
      out[0].lane[i] = kKind == Values::kFp16 ? float_from_fp16(bits) : float_from_bf16(bits);
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

template <Values kKind>
struct ScalarInteger {
  static constexpr Values kValues = kKind;
  using Decoder = unstructured::ScalarDecoder;
  using Stored = uint16_t;
  static constexpr int kBlock = 8;
  static constexpr int kParts = 1;
  static constexpr int kElements = 8;
  static constexpr int kGemvTokens = 2;
  static constexpr int kGemmTile = 4;
  using Element = int16_t;
  using Masks = MaskWords;
  struct Operand {
    int16_t lane[kElements];
  };
  struct Accumulator {
    int32_t lane[kElements];
  };
  using Sum = Scalar<Values::kBf16>::Accumulator;

  static constexpr int rows_at_once(int tokens) { return tokens <= 2 ? 2 : 1; }

  static void decode(const Masks& masks, int row, int block, const uint16_t*& values, Operand out[kParts]) {
    const auto mask = static_cast<uint32_t>(masks.mask[row] >> (block * kBlock));
    for (int i = 0; i < kBlock; ++i) {
      const bool stored = (mask >> i) & 1U;
      out[0].lane[i] = stored ? static_cast<int16_t>(*values) : int16_t{0};
      values += stored;
    }
  }

  static Operand load(const int16_t* p) {
    Operand v;
    std::memcpy(v.lane, p, sizeof(v.lane));
    return v;
  }
  static void store(int16_t* p, const Operand& v) { std::memcpy(p, v.lane, sizeof(v.lane)); }
  static Accumulator zero() { return Accumulator{}; }
  static Sum zero_sum() { return Sum{}; }

  static Accumulator multiply_add(const Operand& w, const Operand& x, Accumulator acc) {
    for (int i = 0; i < kElements; ++i) acc.lane[i] += w.lane[i] * x.lane[i];
    return acc;
  }

  static Sum add_scaled(Sum sum, const Accumulator& acc, float scale) {
    for (int i = 0; i < kElements; ++i) sum.lane[i] += static_cast<float>(acc.lane[i]) * scale;
    return sum;
  }

  static float reduce(const Sum& sum) { return Scalar<Values::kBf16>::reduce(sum); }
};

}  // namespace

const Kernels& scalar_kernels(Values values) { return pick_kernels<Scalar, ScalarInteger>(values, "scalar"); }

}  // namespace sparse_backend::bitmask

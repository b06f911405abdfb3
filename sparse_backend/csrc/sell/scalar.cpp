// Portable kernels: any processor, and the naive form of what the SIMD files do.
#include <cmath>
#include <type_traits>

#include "../unstructured/decode_scalar.h"
#include "kernel_impl.h"

namespace sparse_backend::sell {
namespace {

template <Values kKind>
struct Scalar {
  static constexpr Values kValues = kKind;
  using Decoder = unstructured::ScalarDecoder;
  using Stored = uint16_t;
  static constexpr int kLanes = 8;
  static constexpr bool kInteger = unstructured::is_integer(kKind);
  using Lane = std::conditional_t<kInteger, int32_t, float>;
  struct Vector {
    Lane lane[kLanes];
  };

  static Vector zero() { return Vector{}; }
  static Vector multiply_add(uint32_t weight, const uint8_t* x, Vector acc) {
    Vector v;
    std::memcpy(v.lane, x, sizeof(v.lane));
    for (int i = 0; i < kLanes; ++i) {
      if constexpr (kInteger) {
        acc.lane[i] += static_cast<int16_t>(weight) * v.lane[i];
      } else {
        acc.lane[i] = std::fma(float_from_bits(weight), v.lane[i], acc.lane[i]);
      }
    }
    return acc;
  }
  static void add_scaled(float* out, const Vector& acc, float scale) {
    for (int i = 0; i < kLanes; ++i) {
      out[i] = kInteger ? std::fma(static_cast<float>(acc.lane[i]), scale, out[i])
                        : out[i] + static_cast<float>(acc.lane[i]);
    }
  }
};

template <Values kKind>
constexpr Kernels make() {
  return {"scalar",
          nullptr,
          0,
          [](DType) { return false; },
          nullptr,
          batch<Scalar<kKind>>,
          Scalar<kKind>::kLanes};
}

}  // namespace

const Kernels& scalar_kernels(Values values) {
  static constexpr Kernels table[] = {make<Values::kBf16>(), make<Values::kFp16>(), make<Values::kBf16x12>(),
                                      make<Values::kInt8>(), make<Values::kInt4>()};
  return table[static_cast<int>(values)];
}

}  // namespace sparse_backend::sell

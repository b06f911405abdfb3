// What the kernel templates of strips.h share: activations, and a table of kernels.
#pragma once

#include <type_traits>

#include "quantise.h"
#include "strips.h"

namespace sparse_backend::unstructured {
namespace {

template <DType kType, class Element>
void convert_activations(const void* x, int64_t k, Element* out) {
  if constexpr (kType == DType::kBf16 && std::is_same_v<Element, uint16_t>) {
    std::memcpy(out, x, 2 * k);
  } else {
    for (int64_t i = 0; i < k; ++i) {
      const float value = read_float<kType>(x, i);
      if constexpr (std::is_same_v<Element, float>) {
        out[i] = value;
      } else {
        out[i] = bf16_from_float(value);
      }
    }
  }
}

// One token's activations as Elements: float, bf16 (uint16_t) or quantised (int16_t); zeros up to a multiple
// of `step` columns. Returns their scale.
template <class Element>
float prepare_activations(const void* x, DType dtype, int64_t k, int64_t step, int limit, void* out) {
  auto* to = static_cast<Element*>(out);
  const int64_t padded = round_up(k, step);
  if constexpr (std::is_same_v<Element, int16_t>) {
    return quantise_int16(x, dtype, k, padded, limit, to);
  } else {
    (void)limit;
    std::memset(to + k, 0, (padded - k) * sizeof(Element));
    switch (dtype) {
      case DType::kBf16:
        convert_activations<DType::kBf16>(x, k, to);
        break;
      case DType::kFp16:
        convert_activations<DType::kFp16>(x, k, to);
        break;
      case DType::kFp32:
        convert_activations<DType::kFp32>(x, k, to);
        break;
    }
    return 1.0F;
  }
}

// The kernels of each kind of values: make() of a policy, which is Floats for bf16, fp16 and coded bf16,
// Integers for int8 and int4.
template <template <Values> class Floats, template <Values> class Integers, class Make>
const StripKernels& kernel_table(Values values, const Make& make) {
  static const StripKernels table[] = {make(Floats<Values::kBf16>{}), make(Floats<Values::kFp16>{}),
                                       make(Floats<Values::kBf16x12>{}), make(Integers<Values::kInt8>{}),
                                       make(Integers<Values::kInt4>{})};
  return table[static_cast<int>(values)];
}

}  // namespace
}  // namespace sparse_backend::unstructured

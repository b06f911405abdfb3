// Which instruction set's kernels run. Included only by files compiled for the baseline processor.
#pragma once

#include "../cpu_features.h"
#include "buffer.h"

namespace sparse_backend::unstructured {

// A family's kernels, by level; nullptr where it, or this build, has none of its own.
template <class Kernels>
struct Levels {
  using Table = const Kernels& (*)(Values);
  Table scalar;
  Table avx2 = nullptr;
  Table avx512 = nullptr;
  Table avx512_bf16 = nullptr;   // bf16 values and activations, vdpbf16ps
  Table avx512_bytes = nullptr;  // integer values, int8 activations
  Table amx = nullptr;           // tiles: bf16 values and activations; integer values
  Table amx_bytes = nullptr;     // integer values, int8 activations
};

// What a weight is multiplied by: `int8` of integer values whose activations have 8 bits.
template <class Kernels>
const Kernels& select(const Levels<Kernels>& levels, Values values, DType x_type, bool int8) {
#if defined(__x86_64__)
  const bool bf16 = (values == Values::kBf16 || values == Values::kBf16x12) && x_type == DType::kBf16;
  switch (active_isa()) {
    case Isa::kAmx:
      if (int8 && levels.amx_bytes != nullptr) return levels.amx_bytes(values);
      if ((bf16 || is_integer(values)) && levels.amx != nullptr) return levels.amx(values);
      [[fallthrough]];
    case Isa::kAvx512:
      if (int8 && levels.avx512_bytes != nullptr) return levels.avx512_bytes(values);
      if (bf16 && cpu_features().avx512_bf16) return levels.avx512_bf16(values);
      return levels.avx512(values);
    case Isa::kAvx2:
      return levels.avx2(values);
    case Isa::kScalar:
      break;
  }
#endif
  (void)x_type;
  (void)int8;
  return levels.scalar(values);
}

template <class Kernels>
const Kernels& select(const Levels<Kernels>& levels, const Header& weight, DType x_type) {
  return select(levels, weight.values, x_type, is_integer(weight.values) && weight.activation_bits == 8);
}

}  // namespace sparse_backend::unstructured

// Which instruction set's kernels run. Included only by files compiled for the baseline processor.
#pragma once

#include "../cpu_features.h"
#include "values.h"

namespace sparse_backend::unstructured {

// A family's kernels, by level; nullptr where this build has none.
template <class Kernels>
struct Levels {
  const Kernels& (*scalar)(Values);
  const Kernels& (*avx2)(Values) = nullptr;
  const Kernels& (*avx512)(Values) = nullptr;
  const Kernels& (*avx512_bf16)(Values) = nullptr;  // bf16 values and activations, vdpbf16ps
};

template <class Kernels>
const Kernels& select(const Levels<Kernels>& levels, Values values, DType x_type) {
#if defined(__x86_64__)
  switch (active_isa()) {
    case Isa::kAvx512: {
      const bool bf16 = values == Values::kBf16 || values == Values::kBf16x12;
      if (cpu_features().avx512_bf16 && bf16 && x_type == DType::kBf16) return levels.avx512_bf16(values);
      return levels.avx512(values);
    }
    case Isa::kAvx2:
      return levels.avx2(values);
    case Isa::kScalar:
      break;
  }
#endif
  (void)x_type;
  return levels.scalar(values);
}

}  // namespace sparse_backend::unstructured

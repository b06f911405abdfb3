// AVX-512 F, BW, DQ and VL.
#include "kernel_impl.h"
#include "vectors_avx512.h"

namespace sparse_backend::layers {

const Kernels& avx512_kernels() {
  static const Kernels kernels = make_kernels<Avx512Vector>("avx512");
  return kernels;
}

}  // namespace sparse_backend::layers

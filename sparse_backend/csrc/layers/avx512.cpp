// AVX-512 F, BW and VL.
#include "kernel_impl.h"
#include "vectors_avx512.h"

namespace sparse_backend::layers {

const Kernels& avx512_kernels() {
  static const Kernels kernels = make_kernels<Avx512Vector>();
  return kernels;
}

}  // namespace sparse_backend::layers

// AVX2, FMA, F16C.
#include "kernel_impl.h"
#include "vectors_avx2.h"

namespace sparse_backend::layers {

const Kernels& avx2_kernels() {
  static const Kernels kernels = make_kernels<Avx2Vector>();
  return kernels;
}

}  // namespace sparse_backend::layers

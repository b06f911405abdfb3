// The baseline processor.
#include "kernel_impl.h"
#include "vectors.h"

namespace sparse_backend::layers {

const Kernels& scalar_kernels() {
  static const Kernels kernels = make_kernels<ScalarVector>();
  return kernels;
}

}  // namespace sparse_backend::layers

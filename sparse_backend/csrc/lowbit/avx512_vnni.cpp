// AVX-512 with VNNI and VBMI (Ice Lake, Zen 4 and later). Compiled with AVX-512's flags and
// -mavx512vnni -mavx512vbmi.
#include "zmm.h"

namespace sparse_backend::lowbit {

const Kernels& avx512_vnni_kernels() {
  static constexpr Kernels kernels = make_kernels<Zmm>("avx512_vnni");
  return kernels;
}

}  // namespace sparse_backend::lowbit

#include "linear.h"

#include "../unstructured/select.h"

namespace sparse_backend::bitmask {
namespace {

constexpr unstructured::Levels<Kernels> kLevels{
    scalar_kernels,
#if defined(__x86_64__)
    avx2_kernels,
    avx512_kernels,
    avx512_bf16_kernels,
#endif
};

}  // namespace

const char* kernel_name(Values values, DType x_type) { return select(kLevels, values, x_type).name; }

void linear(const unstructured::View& w, const unstructured::LinearArgs& args, const ThreadPool& pool) {
#if defined(__x86_64__)
  if (w.header.activation_bits == 8 && active_isa() == Isa::kAvx512) {
    return strips_linear(avx512_byte_kernels(w.header.values), w, args, pool);
  }
#endif
  strips_linear(select(kLevels, w.header.values, args.x_type), w, args, pool);
}

}  // namespace sparse_backend::bitmask

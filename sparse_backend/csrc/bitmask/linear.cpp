#include "linear.h"

#include "../unstructured/select.h"

namespace sparse_backend::bitmask {
namespace {

constexpr unstructured::Levels<Kernels> kLevels{
    scalar_kernels,
#if defined(__x86_64__)
    avx2_kernels,   avx512_kernels, avx512_bf16_kernels, avx512_byte_kernels, amx_kernels, amx_byte_kernels,
#endif
};

}  // namespace

const char* kernel_name(Values values, DType x_type) { return level_name(kLevels, values, x_type); }

void linear(const unstructured::View& w, const unstructured::LinearArgs& args, const ThreadPool& pool) {
  strips_linear(select(kLevels, w.header, args), w, args, pool);
}

}  // namespace sparse_backend::bitmask

// y = x W^T + bias on the machine form, with the kernels of the level in use.
#pragma once

#include "../unstructured/linear.h"
#include "kernels.h"

namespace sparse_backend::bitmask {

void linear(const unstructured::View& weight, const unstructured::LinearArgs& args, const ThreadPool& pool);

// The name of the kernel that linear() would run for activations of this type.
const char* kernel_name(Values values, DType x_type);

}  // namespace sparse_backend::bitmask

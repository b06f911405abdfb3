// y = x W^T + bias on the machine form: chooses the kernel, prepares the activations,
// splits the rows over threads, converts the results.
#pragma once

#include "../unstructured/linear.h"
#include "kernels.h"

namespace sparse_backend::sell {

void linear(const unstructured::View& weight, const unstructured::LinearArgs& args, const ThreadPool& pool);

// The same with these kernels, which must be those of the weight's values.
void linear_with(const Kernels& kernels, const unstructured::View& weight,
                 const unstructured::LinearArgs& args, const ThreadPool& pool);

// The name of the kernel that linear() would run for many tokens of this type.
const char* kernel_name(Values values, DType x_type);

}  // namespace sparse_backend::sell

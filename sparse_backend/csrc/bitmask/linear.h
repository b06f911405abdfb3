// y = x W^T + bias on the machine form: chooses the kernel, prepares the activations,
// splits the rows over threads, converts the results.
#pragma once

#include "../common.h"
#include "layout.h"

namespace sparse_backend::bitmask {

struct LinearArgs {
  const void* x;  // [tokens, K], contiguous
  DType x_type;
  int64_t tokens;
  const void* bias;  // [N] of bias_type, or nullptr
  DType bias_type;
  void* y;  // [tokens, N], of x_type
};

void linear(const View& weight, const LinearArgs& args, const ThreadPool& pool);

// The name of the kernel that linear() would run for activations of this type.
const char* kernel_name(DType value_type, DType x_type);

}  // namespace sparse_backend::bitmask

// y = x W^T + bias for a weight as it is, row by row: torch builds without a fast bf16 product for
// one token read it at a third of the memory's bandwidth.
#pragma once

#include <cstdint>

#include "../common.h"

namespace sparse_backend::layers {

struct DenseLinearArgs {
  const void* x;  // [tokens][in_features]
  DType x_type;   // and of y
  int64_t tokens;
  const void* w;  // [out_features][w_stride]
  DType w_type;
  int64_t out_features, in_features, w_stride;
  const void* bias;  // [out_features] or nullptr
  DType bias_type;
  void* y;  // [tokens][out_features]
};

void dense_linear(const DenseLinearArgs& args, const ThreadPool& pool);

}  // namespace sparse_backend::layers

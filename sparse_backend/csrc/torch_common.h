// What the files that see torch share. They see only its stable ABI: one build serves every torch
// from 2.10.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "common.h"

namespace {

using sparse_backend::DType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline sparse_backend::ThreadPool torch_pool() {
  const auto run = [](int64_t count, void (*task)(int64_t, void*), void* context) {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) task(i, context);
    });
  };
  return {static_cast<int>(torch::stable::get_num_threads()), run};
}

inline DType dtype_of(const Tensor& t, const char* what) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16:
      return DType::kBf16;
    case ScalarType::Half:
      return DType::kFp16;
    case ScalarType::Float:
      return DType::kFp32;
    default:
      STD_TORCH_CHECK(false, what, " must be bfloat16, float16 or float32");
  }
  return DType::kFp32;
}

inline void check_bytes(const Tensor& t, int64_t dim, const char* what) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Byte && t.dim() == dim && t.is_contiguous(), what,
                  " must be a contiguous uint8 tensor of ", dim, " dimension(s)");
}

// What every linear op checks and allocates alike. `x` and `bias` are kept contiguous here.
struct LinearTensors {
  DType x_type, bias_type = DType::kFp32;
  int64_t tokens = 1;
  Tensor y, x, bias;
  const void* bias_data = nullptr;
};

inline LinearTensors linear_tensors(const Tensor& x, const std::optional<Tensor>& bias, int64_t n, int64_t k,
                                    int64_t out_features) {
  LinearTensors out;
  out.x_type = dtype_of(x, "x");
  STD_TORCH_CHECK(n == out_features, "packed weight has ", n, " output features, not ", out_features);
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == k,
                  "the last dimension of x must be in_features = ", k);
  std::vector<int64_t> shape;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) {
    shape.push_back(x.size(d));
    out.tokens *= x.size(d);
  }
  shape.push_back(n);
  out.y = torch::stable::new_empty(x, shape);
  out.x = x.is_contiguous() ? x : torch::stable::contiguous(x);
  if (bias.has_value()) {
    out.bias_type = dtype_of(*bias, "bias");
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == n, "bias must have shape [", n, "]");
    out.bias = bias->is_contiguous() ? *bias : torch::stable::contiguous(*bias);
    out.bias_data = out.bias.const_data_ptr();
  }
  return out;
}

}  // namespace

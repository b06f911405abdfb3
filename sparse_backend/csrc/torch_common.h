// What the files that see torch share. They see only its stable ABI: one build serves every torch
// from 2.10.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

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

}  // namespace

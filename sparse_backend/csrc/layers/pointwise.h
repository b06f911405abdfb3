// What a transformer does to each token between its projections.
#pragma once

#include <cstdint>

#include "../common.h"

namespace sparse_backend::layers {

struct RmsNormArgs {
  const void* x;  // [tokens][size]
  DType type;
  int64_t tokens, size;
  const void* residual;  // [tokens][size] or nullptr
  const void* weight;    // [size]
  DType weight_type;
  float eps;
  bool round_before_weight;
  void* y;    // [tokens][size]
  void* sum;  // [tokens][size]; with `residual` only
};

void rms_norm(const RmsNormArgs& args, const ThreadPool& pool);

struct RotaryArgs {
  void* x;  // [tokens][heads][head_dim], in place
  DType type;
  int64_t tokens, stride, heads, head_dim;
  int rotary_dim;
  const int64_t* positions;  // [tokens]
  const float* cos_sin;      // [rows][rotary_dim]: cosines, then sines
  bool halves;
};

void rotary_embedding(const RotaryArgs& args, const ThreadPool& pool);

// out[t][i] = silu(x[t][i]) * x[t][size + i]
void silu_and_mul(const void* x, DType type, int64_t tokens, int64_t size, void* out, const ThreadPool& pool);

}  // namespace sparse_backend::layers

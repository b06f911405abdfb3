// y = x W^T + bias on the machine form: chooses the kernel, makes integers of the activations,
// splits the rows over threads.
#pragma once

#include "../common.h"
#include "layout.h"

namespace sparse_backend::lowbit {

struct LinearArgs {
  Header header;
  const uint8_t* panels;
  const void* scales;  // [1], or [groups][N]
  DType scale_type;
  bool one_scale;
  const void* x;  // [tokens, K], contiguous
  DType x_type;
  int64_t tokens;
  const float* absmax;  // [tokens] magnitudes to scale activations by, or nullptr
  const void* bias;     // [N] of bias_type, or nullptr
  DType bias_type;
  void* y;  // [tokens, N], of x_type
};

void linear(const LinearArgs& args, const ThreadPool& pool);

// Writes rows [begin, end) of activations, `stride` bytes each, to their places in tiles (UnitArgs::x_tiles).
void arrange_tiles(const int8_t* x, int64_t stride, int rows, int64_t begin, int64_t end, int8_t* out);

// The name of the kernel that linear() would run.
const char* kernel_name();

}  // namespace sparse_backend::lowbit

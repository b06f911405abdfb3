// The interface between the drivers (attention.cpp, dense.cpp, pointwise.cpp) and the kernels of one
// instruction set: what a transformer computes around its packed projections. Everything is
// accumulated in float32, in an order that depends on neither batch nor threads.
#pragma once

#include <cstdint>

#include "../common.h"

namespace sparse_backend::layers {

// Query rows of one attention task share a head of K and V.
constexpr int kAttentionRows = 16;
// Positions whose scores are computed before their values are read.
constexpr int kPositions = 64;
// Columns of a dense product that are summed before the sum is put down.
constexpr int64_t kDenseColumns = 2048;

// Softmax(q K^T) V of some rows over some positions: `largest`, `total` and `sums` say how far it is.
struct AttendArgs {
  const float* q;  // [rows][q_stride], scaled, zero past head_dim
  int64_t q_stride;
  int rows;  // 1..kAttentionRows
  int head_dim, v_dim;
  const void* k;  // of one head, at slot 0
  const void* v;
  int64_t k_stride, v_stride;  // elements from slot to slot
  const int32_t* slots;        // of every position of the sequence
  int64_t begin, end;          // positions; `begin` is a multiple of kPositions
  const int64_t* first;        // [rows]: a row sees positions first..last-1
  const int64_t* last;
  float logit_cap;  // 0: none
  float* scores;    // [rows][kPositions]
  float* largest;   // [rows]; -infinity before the first position
  float* total;     // [rows]
  float* sums;      // [rows][sum_stride]
  int64_t sum_stride;
};

// sums[t][r] += x[t] . w[r] over columns first..last-1.
struct DenseArgs {
  const void* w;
  int64_t w_stride;  // elements
  int rows;
  const float* x;  // [tokens][x_stride]
  int64_t x_stride;
  int tokens;
  int64_t first, last;
  float* sums;  // [tokens][sum_stride]
  int64_t sum_stride;
};

struct NormArgs {
  const void* x;         // [size]
  const void* residual;  // added first; nullptr: none
  const void* weight;    // [size]
  DType weight_type;
  int64_t size;
  float eps;
  bool round_before_weight;
  float* scratch;  // [size]
  void* y;
  void* sum;  // x + residual, rounded
};

struct RotateArgs {
  void* x;  // [heads][head_dim], in place
  int64_t heads, head_stride;
  int rotary_dim;
  const float* cos;  // [rotary_dim / 2]
  const float* sin;
  bool halves;  // pairs are (i, i + rotary_dim / 2); otherwise (2i, 2i + 1)
};

struct Kernels {
  void (*attend[3])(const AttendArgs&);  // by DType of the cache
  void (*dense[3])(const DenseArgs&);    // by DType of the weight
  void (*norm[3])(const NormArgs&);      // by DType of x
  void (*rotate[3])(const RotateArgs&);
  void (*silu[3])(const void* gate, const void* up, int64_t count, void* out);
  void (*widen[3])(const void* x, int64_t count, float factor, float* out);
  void (*narrow[3])(const float* x, int64_t count, float factor, void* out);
};

const Kernels& scalar_kernels();
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
// Of the active level.
const Kernels& kernels();

}  // namespace sparse_backend::layers

// What the formats cut into strips of 16 rows share (bitmask/, lanes/, sell/ on AMX): a 32-bit lane is a row,
// so no sum crosses lanes and an activation is one broadcast. The driver is strips.cpp.
#pragma once

#include "values.h"

namespace sparse_backend::unstructured {

struct View;
struct LinearArgs;

constexpr int kStripRows = 16;
// Strips per kernel call: memory delivers several streams faster than one.
constexpr int kUnitStrips = 4;
constexpr int kMostUnitStrips = 16;  // of kernels that take more (BatchKernel::strips)

struct StripArgs {
  const uint8_t* strip[kMostUnitStrips];  // the stream of each's part; nullptr for one that stores nothing
  int strips;                             // at least 1
  bool one_stream;                        // this processor reads faster strip after strip (cpu_features.h)
  int64_t columns;
  const ExponentTable* exponents;  // of kBf16x12 values
  const float* scales;             // integer values: of the first strip's first group
  int64_t strip_scales;            // floats from one strip's scales to the next one's
  int64_t group_scales;            // floats from one group's to the next one's
  int64_t group_columns;           // columns per group of scales; 0: one group
  const uint8_t* x;       // activations in tiles of tokens: [tile][x_unit_bytes' worth of columns][token]
  int64_t x_row_bytes;    // of one token
  int tile_tokens;        // of a tile; the last one may have fewer
  const int32_t* x_sums;  // [tokens][x_sum_stride] sums of 16 columns, for kernels that ask
  int64_t x_sum_stride;
  int tokens;
  float* out;     // [strips][tokens][kStripRows]; of integer values before the activations' scales
  void* scratch;  // StripKernels::scratch_bytes, 64-byte aligned
};

// A kernel for larger batches, which decodes blocks of columns into scratch memory.
struct BatchKernel {
  void (*run)(const StripArgs& args);
  int tokens;                // most per call
  int tile;                  // most in a tile
  int step;                  // a tile has room for a multiple of so many tokens, padded with zeros
  int strips = kUnitStrips;  // most per call, for more than one tile of tokens; calls are of whole parts
};

// One instruction set's kernels for one kind of stored values.
struct StripKernels {
  const char* name;
  int64_t x_element_bytes;  // of the prepared activations
  int64_t x_unit_bytes;     // of a token's activations that stand together in a tile: 4, 8, 16, 64 or 128
  int64_t column_step;      // activations are zero-padded to a multiple of so many columns
  int gemv_tokens;          // most in a tile of `gemv`; 0: `gemm` takes any number
  int gemv_tiles;           // batches of up to so many tiles are faster with `gemv`
  bool wants_sums;          // of the activations, 16 by 16
  int64_t scratch_bytes;    // per thread
  int part_strips = 1;      // in a part of the stream: 1 or 4
  // Converts one token's `k` activations, zero-padded. For integer values they are int16 below `limit`;
  // returns their scale.
  float (*prepare)(const void* x, DType dtype, int64_t k, int limit, void* out);
  // Decodes into registers, for 1..gemv_tokens tokens.
  void (*gemv)(const StripArgs& args);
  BatchKernel gemm;
};

// y = x W^T + bias: prepares the activations, splits the strips over threads, converts the results.
void strips_linear(const StripKernels& kernels, const View& weight, const LinearArgs& args,
                   const ThreadPool& pool);

}  // namespace sparse_backend::unstructured

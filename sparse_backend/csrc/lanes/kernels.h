// The interface between the driver (linear.cpp) and the kernels of one instruction set.
//
// Floors per block of 256 weights and token: run_bytes(values, 256) of memory; 16 multiply-adds of 16
// floats, or 8 dot products of 16 pairs.
#pragma once

#include <cstdint>

#include "layout.h"

namespace sparse_backend::lanes {

using unstructured::ExponentTable;

// Strips per call, so that kernels can read several streams of memory at once.
constexpr int kUnitStrips = 4;
// Tokens per call for larger batches.
constexpr int kGemmTokens = 48;
// Blocks decoded at a time by the batched kernel: 16 KB of floats, and 6 KB of activations per tile, fit an
// L1 cache that two threads share.
constexpr int kChunkBlocks = 16;
// Integer sums are moved into floats at the latest after so many blocks, before they overflow:
// 512 products of at most 127 * 32767.
constexpr int kFlushBlocks = 32;
// Vectors of 16 lanes per token: accumulators of a kernel, at most.
constexpr int kMostSums = 4;
// Bytes of scratch a kernel needs per thread: decoded blocks, accumulators, sums.
constexpr int64_t kScratchBytes =
    int64_t{kFlushBlocks} * kBlockWeights * 4 + int64_t{kGemmTokens} * (kMostSums + 1) * 64;

struct UnitArgs {
  const uint8_t* strip[kUnitStrips];  // the stream of each; nullptr for one that stores nothing
  int strips;                         // 1..kUnitStrips
  const ExponentTable* exponents;     // of kBf16x12 values
  const float* scales;                // integer values: of the first strip, [groups][kStripRows]
  int64_t strip_scales;               // floats from one strip's scales to the next one's
  int64_t group_columns;              // columns per group of scales; 0: one group
  const uint8_t* x;       // activations in tiles of tokens: [tile][4 bytes' worth of columns][token]
  int64_t x_row_bytes;    // of one token
  int tile_tokens;        // of a tile; the last one may have fewer
  const int32_t* x_sums;  // [tokens][x_sum_stride] sums of 16 columns, for kernels that ask
  int64_t x_sum_stride;
  int tokens;
  float* out;     // [strips][tokens][kStripRows]; of integer values before the activations' scales
  void* scratch;  // kScratchBytes, 64-byte aligned
};

// One instruction set's kernels for one kind of stored values.
struct Kernels {
  const char* name;
  int64_t x_element_bytes;  // of the prepared activations
  int gemv_tokens;          // batches up to this size are faster with `gemv`
  bool wants_sums;          // of the activations, block by block
  int gemm_tile;            // most tokens in a tile of `gemm`; of `gemv` all are one
  // Converts one token's `k` activations, zero-padded to whole blocks. For integer values they are
  // int16 below `limit`; returns their scale.
  float (*prepare)(const void* x, DType dtype, int64_t k, int limit, void* out);
  // Decodes into registers, for 1..gemv_tokens tokens.
  void (*gemv)(const UnitArgs& args);
  // Decodes blocks into scratch memory, for 1..kGemmTokens tokens.
  void (*gemm)(const UnitArgs& args);
};

const Kernels& scalar_kernels(Values values);
#if defined(__x86_64__)
const Kernels& avx2_kernels(Values values);
const Kernels& avx512_kernels(Values values);
const Kernels& avx512_bf16_kernels(Values values);  // bf16 values and activations, vdpbf16ps
#endif

}  // namespace sparse_backend::lanes

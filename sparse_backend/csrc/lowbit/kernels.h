// The interface between the driver (linear.cpp) and the kernels of one instruction set.
//
// All arithmetic on codes is exact in int32, so kernels may differ in order and still give the
// same bits. Floors per 64-byte line of 2-bit codes (256 weights): 64 bytes of memory; with
// VNNI 4 ANDs and 4 dot products per token.
#pragma once

#include <cstdint>

#include "../common.h"
#include "layout.h"

namespace sparse_backend::lowbit {

// Panels whose outputs are computed by one call.
constexpr int kUnitPanels = 2;
constexpr int kUnitRows = kUnitPanels * kPanelRows;
// Rows of activations in one call of `gemm`: of most kernels, and of those with tiles.
constexpr int kGemmRows = 96, kTileGemmRows = 128;
constexpr int kTileRows = 16, kTileColumns = 64;
// Columns decoded at a time: whole blocks of every layout, whole groups of every size.
constexpr int64_t kGemmColumns = 1280;
constexpr int64_t kScratchBytes = kUnitRows * kGemmColumns;
// The same by kernels with tiles, of weights without groups: with more, what is decoded does not stay in an
// L1 cache (17408 x 5120, 64 tokens, one thread of Emerald Rapids: 11.1 ms with 1280, 9.2 with 320).
constexpr int64_t kTileGemmColumns = 320;

struct UnitArgs {
  const Plan* plan;
  const uint8_t* panel[kUnitPanels];
  int panels;       // 1..kUnitPanels
  bool one_stream;  // this processor reads faster panel after panel (cpu_features.h)
  const int8_t* x;  // prepared activations, [rows][x_stride], 64-byte aligned, zero past the last column
  int64_t x_stride;
  int rows;
  // The same for kernels that ask (Kernels::tiles), in tiles of tile_height(rows) rows, of which the last
  // one may have fewer: [tile][x_stride / kTileColumns][row][kTileColumns].
  const int8_t* x_tiles;
  int32_t* out;      // [segments][rows][kUnitRows] sums of codes times activations
  uint8_t* scratch;  // kScratchBytes, 64-byte aligned; only for `gemm`
};

struct PrepareArgs {
  const Plan* plan;
  const void* x;  // one token, K values
  DType type;
  int limbs;
  const float* absmax;  // the largest magnitude to scale by; nullptr: find it
  int8_t* out;          // [limbs][plan->padded], least significant limb first
  int32_t* sums;        // [limbs][plan->segments] sums of out
  float* scale;         // activation = scale * integer
};

struct FinishArgs {
  const Plan* plan;
  const int32_t* sums_out;  // UnitArgs::out
  int rows, limbs;
  int segments_per_group;
  const int32_t* x_sums;  // [rows][segments]
  const float* x_scales;  // [tokens]
  const void* scales;     // [groups][scale_stride] at this unit's first row; one value if scale_stride is 0
  DType scale_type;
  int64_t scale_stride;
  const void* bias;  // [N] or nullptr
  DType bias_type;
  int64_t first_row, count;  // of the outputs
  void* y;                   // [tokens][out_features]
  DType type;
  int64_t out_features;
};

// Rows of a tile: as few tiles as there may be, of equal height.
constexpr int tile_height(int rows) {
  const int tiles = (rows + kTileRows - 1) / kTileRows;
  return (rows + tiles - 1) / tiles;
}

struct Kernels {
  const char* name;
  int gemv_rows;  // up to this many rows of activations `gemv` is faster
  void (*prepare)(const PrepareArgs& args);
  void (*gemv)(const UnitArgs& args);  // decodes into registers
  void (*gemm)(const UnitArgs& args);  // decodes into scratch
  void (*finish)(const FinishArgs& args);
  bool tiles = false;  // `gemm` takes UnitArgs::x_tiles
};

const Kernels& scalar_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx_vnni_kernels();
const Kernels& avx512_vnni_kernels();
const Kernels& amx_kernels();
#endif

}  // namespace sparse_backend::lowbit

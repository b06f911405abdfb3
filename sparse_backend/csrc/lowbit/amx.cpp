// AMX int8 tiles for batches; small ones run AVX-512 VNNI. Sixteen decoded steps (64 columns of 16
// output rows) are one B tile as they lie in scratch; A is 16 rows of activations by 64 columns.
// tdpbsud multiplies signed activations by unsigned codes. Compiled with -mamx-tile -mamx-int8
// beside the flags of avx512_vnni.cpp; the driver asks the operating system for tile state first.
#include "zmm.h"

namespace sparse_backend::lowbit {
namespace {

constexpr int kTileRows = 16;
constexpr int kTileSteps = 16;

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t column_bytes[16];
  uint8_t rows[16];
};

// Tiles 0 to 2 hold sums, activations and codes.
inline void configure(int rows) {
  TileConfig config{};
  config.palette = 1;
  for (int t = 0; t < 3; ++t) {
    config.column_bytes[t] = 64;
    config.rows[t] = static_cast<uint8_t>(t == 2 ? kTileSteps : rows);
  }
  _tile_loadconfig(&config);
}

template <bool kInt8>
void tile_block(const BlockArgs& b) {
  const int64_t whole = b.steps / kTileSteps;
  for (int panel = 0; panel < b.panels; ++panel) {
    const uint8_t* w = b.w + panel * b.panel_stride;
    for (int r = 0; r < b.rows && whole > 0; r += kTileRows) {
      const int rows = static_cast<int>(at_most(b.rows - r, kTileRows));
      configure(rows);
      int32_t* out = b.out + r * kUnitRows + panel * kPanelRows;
      _tile_loadd(0, out, kUnitRows * sizeof(int32_t));
      for (int64_t i = 0; i < whole; ++i) {
        for (int line = 0; kInt8 && r == 0 && line < kTileSteps; ++line) {
          prefetch(w + (i * kTileSteps + line) * kLine);
        }
        _tile_loadd(1, b.x + r * b.x_stride + i * 64, b.x_stride);
        _tile_loadd(2, w + i * kTileSteps * kLine, kLine);
        _tile_dpbsud(0, 1, 2);
      }
      _tile_stored(0, out, kUnitRows * sizeof(int32_t));
    }
  }
  if (whole > 0) _tile_release();
  BlockArgs rest = b;
  rest.w += whole * kTileSteps * kLine;
  rest.x += whole * 64;
  rest.steps -= whole * kTileSteps;
  block<Zmm, kInt8>(rest);
}

}  // namespace

const Kernels& amx_kernels() {
  static constexpr Kernels kernels{"amx_int8",
                                   Zmm::kGemvRows,
                                   prepare,
                                   gemv_or_gemm<Zmm, tile_block<false>, tile_block<true>>,
                                   gemm<Zmm, tile_block<false>, tile_block<true>>,
                                   finish<Zmm::kInt8Offset>};
  return kernels;
}

}  // namespace sparse_backend::lowbit

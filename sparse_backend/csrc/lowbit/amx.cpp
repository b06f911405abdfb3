// AMX int8 tiles for batches; small ones run AVX-512 VNNI. Sixteen decoded steps (64 columns of 16
// output rows) are one B tile as they lie in scratch; A is 16 rows of activations by 64 columns, signed, the
// codes are not. Compiled with the flags of avx512_vnni.cpp; the tiles are inline assembly.
#include "../tiles.h"
#include "../unstructured/unroll.h"
#include "zmm.h"

namespace sparse_backend::lowbit {
namespace {

using unstructured::each;

constexpr int kTileSteps = kTileColumns / 4;  // of four columns

// Tiles 0 to 3 hold sums, 4 and 5 activations, 6 and 7 codes.
constexpr int kFirstX = 4, kFirstW = 6;

// `count` tiles of kPanels panels from number `panel` on times kX tiles of
// activations from row `row` on.
template <int kPanels, int kX, bool kInt8>
void tile_product(const BlockArgs& b, int64_t count, int panel, int row) {
  const int height = tile_height(b.rows);
  int rows[kX];
  const int8_t* x[kX];
  tiles::Config config;
  for (int i = 0; i < kX; ++i) {
    const int from = row + i * height;
    rows[i] = b.rows - from < height ? b.rows - from : height;
    x[i] = b.x_tiles + from * b.x_stride + b.column * rows[i];
    config.set(kFirstX + i, rows[i], tiles::kRowBytes);
    for (int p = 0; p < kPanels; ++p) config.set(p * kX + i, rows[i], tiles::kRowBytes);
  }
  for (int w = kFirstW; w < tiles::kTiles; ++w) config.set(w, kTileSteps, tiles::kRowBytes);
  tiles::configure(config);

  constexpr int64_t kOutStride = kUnitRows * int64_t{sizeof(int32_t)};
  int32_t* const out = b.out + row * kUnitRows + panel * kPanelRows;
  const auto sums = [&](int p, int i) { return out + i * height * kUnitRows + p * kPanelRows; };
  const uint8_t* w = b.w + panel * b.panel_stride;
  each<kPanels * kX>([&](auto c) SPARSE_BACKEND_INLINE { tiles::load<c>(sums(c / kX, c % kX), kOutStride); });
  for (int64_t t = 0; t < count; ++t, w += tiles::kBytes) {
    if (kInt8 && row == 0) {  // from memory; other rows find it in the cache
      for (int line = 0; line < kTileSteps; ++line) {
        for (int p = 0; p < kPanels; ++p) prefetch(w + p * b.panel_stride + line * kLine);
      }
    }
    each<kX>([&](auto i)
                 SPARSE_BACKEND_INLINE { tiles::load<kFirstX + i>(x[i] + t * rows[i] * kTileColumns); });
    each<kPanels>([&](auto p) SPARSE_BACKEND_INLINE {
      constexpr int kP = p;
      tiles::load<kFirstW + kP>(w + kP * b.panel_stride);
      each<kX>([](auto i) SPARSE_BACKEND_INLINE {
        tiles::multiply<tiles::Dot::kSignedByUnsigned, kP * kX + i, kFirstX + i, kFirstW + kP>();
      });
    });
  }
  each<kPanels * kX>([&](auto c)
                         SPARSE_BACKEND_INLINE { tiles::store<c>(sums(c / kX, c % kX), kOutStride); });
}

template <bool kInt8, int kPanels>
void tile_panels(const BlockArgs& b, int64_t count, int panel) {
  const int height = tile_height(b.rows);
  for (int row = 0; row < b.rows; row += 2 * height) {
    if (b.rows - row > height) {
      tile_product<kPanels, 2, kInt8>(b, count, panel, row);
    } else {
      tile_product<kPanels, 1, kInt8>(b, count, panel, row);
    }
  }
}

template <bool kInt8>
void tile_block(const BlockArgs& b) {
  const int64_t whole = b.x_tiles == nullptr ? 0 : b.steps / kTileSteps;
  int panel = 0;
  for (; whole > 0 && panel + 2 <= b.panels; panel += 2) tile_panels<kInt8, 2>(b, whole, panel);
  if (whole > 0 && panel < b.panels) tile_panels<kInt8, 1>(b, whole, panel);
  if (whole > 0) tiles::release();
  BlockArgs rest = b;
  rest.w += whole * tiles::kBytes;
  rest.x += whole * kTileColumns;
  rest.steps -= whole * kTileSteps;
  if (rest.steps > 0) block<Zmm, kInt8>(rest);
}

}  // namespace

const Kernels& amx_kernels() {
  static constexpr Kernels kernels{"amx",
                                   Zmm::kGemvRows,
                                   prepare,
                                   gemv_or_gemm<Zmm, tile_block<false>, tile_block<true>>,
                                   gemm<Zmm, tile_block<false>, tile_block<true>>,
                                   finish<Zmm::kInt8Offset>,
                                   true};
  return kernels;
}

}  // namespace sparse_backend::lowbit

// The batched kernels, over the same `Simd` policy as gemv_impl.h: panels are decoded into scratch
// memory, and a register tile of rows of activations goes over that.
#pragma once

#include "gemv_impl.h"

namespace sparse_backend::lowbit {
namespace {

template <class Simd, int kSlot>
inline void store_code2(const typename Simd::Reg line[], uint8_t* out) {
  for (int p = 0; p < Simd::kParts; ++p) {
    Simd::store(out + kSlot * kLine + p * (kLine / Simd::kParts), Simd::template code2<kSlot>(line[p]));
  }
}

template <class Simd>
inline void decode2(const uint8_t* w, int64_t lines, uint8_t* out) {
  for (int64_t i = 0; i < lines; ++i, w += kLine, out += 4 * kLine) {
    prefetch(w);
    typename Simd::Reg line[Simd::kParts];
    for (int p = 0; p < Simd::kParts; ++p) line[p] = Simd::load(w + p * (kLine / Simd::kParts));
    store_code2<Simd, 0>(line, out);
    store_code2<Simd, 1>(line, out);
    store_code2<Simd, 2>(line, out);
    store_code2<Simd, 3>(line, out);
  }
}

// Decodes columns [first, first + most), fewer at the end, of one panel to steps of 4 columns, 64 bytes each,
// in their natural order. `first` is a multiple of `most`. Returns the steps written.
template <class Simd>
int64_t decode_columns(const Plan& plan, const uint8_t* w, int64_t first, int64_t most, uint8_t* out) {
  uint8_t* const begin = out;
  int64_t columns = at_most(plan.columns - first, most);
  const int block_lines = plan.span / 4;
  int64_t line = first / 20;  // whole blocks: `most` is a multiple of 5 * span
  for (; line < plan.lines5 && columns > 0; line += block_lines, columns -= 5 * plan.span) {
    for (int i = 0; i < block_lines; ++i) {
      const uint8_t* source = w + (line + i) * kLine;
      prefetch(source);
      for (int p = 0; p < Simd::kParts; ++p) {
        typename Simd::Reg codes[5];
        Simd::codes5(Simd::load(source + p * (kLine / Simd::kParts)), codes);
        for (int slot = 0; slot < 5; ++slot) {
          Simd::store(out + (slot * block_lines + i) * kLine + p * (kLine / Simd::kParts), codes[slot]);
        }
      }
    }
    out += 5 * block_lines * kLine;
  }
  if (columns <= 0) return (out - begin) / kLine;
  const int64_t first2 = first > plan.lines5 * 20 ? (first - plan.lines5 * 20) / 16 : 0;
  const int64_t count = at_most(plan.lines2 - first2, columns / 16);
  const uint8_t* source = w + (plan.lines5 + first2) * kLine;
  decode2<Simd>(source, count, out);
  out += count * 4 * kLine;
  if (columns > count * 16 && plan.tail_bytes > 0) {
    alignas(64) uint8_t tail[kLine];
    expand_tail(source + count * kLine, plan.tail_bytes, tail);
    decode2<Simd>(tail, 1, out);
    out += 4 * kLine;
  }
  return (out - begin) / kLine;
}

// The product of decoded (or int8) steps of panels with all rows of activations, added to `out`.
struct BlockArgs {
  const uint8_t* w;
  int64_t panel_stride;  // bytes
  int panels;
  const int8_t* x;
  int64_t x_stride;
  int rows;
  const int8_t* x_tiles;  // UnitArgs::x_tiles
  int64_t column;         // of x
  int64_t steps;
  int32_t* out;  // [rows][kUnitRows]
};

// kPanels panels from number `panel` on times kRows rows of activations from number `row` on. int8 weights
// come from memory for the first rows, and from the cache for the others. Two panels use every broadcast
// twice, of which processors make fewer than dot products.
template <class Simd, int kPanels, int kRows, bool kInt8>
void tile(const BlockArgs& b, int panel, int row) {
  constexpr int kLanes = kPanelRows / Simd::kParts;
  const uint8_t* w = b.w + panel * b.panel_stride;
  const int8_t* x = b.x + row * b.x_stride;
  int32_t* const out = b.out + row * kUnitRows + panel * kPanelRows;
  for (int64_t steps = b.steps; steps > 0;) {
    const int64_t count = kInt8 ? steps : at_most(steps, Simd::kSteps);
    Totals<Simd, kRows> sum[kPanels];
#pragma GCC unroll 2
    for (int s = 0; s < kPanels; ++s) sum[s].clear();
    for (int64_t i = 0; i < count; ++i, w += kLine, x += 4) {
      typename Simd::Reg line[kPanels][Simd::kParts];
#pragma GCC unroll 2
      for (int s = 0; s < kPanels; ++s) {
        const uint8_t* from = w + s * b.panel_stride;
        if (kInt8 && row == 0) prefetch<true>(from);
#pragma GCC unroll 2
        for (int p = 0; p < Simd::kParts; ++p) line[s][p] = Simd::load(from + p * (kLine / Simd::kParts));
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const auto xv = Simd::broadcast(x + r * b.x_stride);
#pragma GCC unroll 2
        for (int s = 0; s < kPanels; ++s) {
#pragma GCC unroll 2
          for (int p = 0; p < Simd::kParts; ++p) {
            auto& reg = sum[s].reg[r][p];
            reg = kInt8 ? Simd::dot8(reg, line[s][p], xv) : Simd::dot(reg, line[s][p], xv);
          }
        }
      }
    }
#pragma GCC unroll 2
    for (int s = 0; s < kPanels; ++s) {
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int p = 0; p < Simd::kParts; ++p) {
          int32_t* at = out + r * kUnitRows + s * kPanelRows + p * kLanes;
          const auto before = Simd::load(reinterpret_cast<const uint8_t*>(at));
          Simd::store(at,
                      kInt8 ? Simd::add(before, sum[s].reg[r][p]) : Simd::widen(before, sum[s].reg[r][p]));
        }
      }
    }
    steps -= count;
  }
}

template <class Simd, bool kInt8, int kPanels, int kRows>
void tile_rows(int rows, const BlockArgs& b, int panel, int row) {
  if (rows == kRows) return tile<Simd, kPanels, kRows, kInt8>(b, panel, row);
  if constexpr (kRows > 1) tile_rows<Simd, kInt8, kPanels, kRows - 1>(rows, b, panel, row);
}

template <class Simd, bool kInt8>
void block(const BlockArgs& b) {
  // Tiles of equal height: 8 rows are 4 and 4, not 6 and 2.
  const int tiles = (b.rows + Simd::kGemmTile - 1) / Simd::kGemmTile;
  const int height = (b.rows + tiles - 1) / tiles;
  for (int r = 0; r < b.rows; r += height) {
    const int rows = static_cast<int>(at_most(b.rows - r, height));
    int panel = 0;
    for (; panel + Simd::kTilePanels <= b.panels; panel += Simd::kTilePanels) {
      tile_rows<Simd, kInt8, Simd::kTilePanels, Simd::kGemmTile>(rows, b, panel, r);
    }
    for (; panel < b.panels; ++panel) tile_rows<Simd, kInt8, 1, Simd::kGemmTile>(rows, b, panel, r);
  }
}

// kBlockCodes and kBlockInt8 do the multiplying: `block` of this policy, or AMX's.
template <class Simd, void (*kBlockCodes)(const BlockArgs&), void (*kBlockInt8)(const BlockArgs&)>
void gemm(const UnitArgs& a) {
  const Plan& plan = *a.plan;
  std::memset(a.out, 0, plan.segments * a.rows * kUnitRows * sizeof(int32_t));
  BlockArgs b{};
  b.panels = a.panels;
  b.x_stride = a.x_stride;
  b.rows = a.rows;
  b.x_tiles = a.x_tiles;
  const int64_t most = a.x_tiles != nullptr && plan.segment == 0 ? kTileGemmColumns : kGemmColumns;
  for (int64_t first = 0; first < plan.columns; first += most) {
    b.x = a.x + first;
    b.column = first;
    b.out = a.out;
    if (plan.storage == Storage::kInt8) {
      b.w = a.panel[0] + first / 4 * kLine;
      b.panel_stride = plan.panel_bytes;
      b.steps = (at_most(plan.columns - first, most) + 3) / 4;
      kBlockInt8(b);
      continue;
    }
    b.w = a.scratch;
    b.panel_stride = most / 4 * kLine;
    int64_t left = 0;
    for (int panel = 0; panel < a.panels; ++panel) {
      left = decode_columns<Simd>(plan, a.panel[panel], first, most, a.scratch + panel * b.panel_stride);
    }
    if (plan.segment == 0) {
      b.steps = left;
      kBlockCodes(b);
      continue;
    }
    int64_t segment = first / plan.segment;
    while (left > 0) {
      b.steps = at_most(left, plan.segment / 4);
      b.out = a.out + segment * a.rows * kUnitRows;
      kBlockCodes(b);
      b.w += b.steps * kLine;
      b.x += b.steps * 4;
      b.column += b.steps * 4;
      left -= b.steps;
      ++segment;
    }
  }
}

// Column groups at 1.6 bits lie across lines: those go through scratch at any batch. int8 weights are not
// decoded, and a second pass over them is no faster than a tile.
template <class Simd, void (*kBlockCodes)(const BlockArgs&), void (*kBlockInt8)(const BlockArgs&)>
void gemv_or_gemm(const UnitArgs& a) {
  const bool across_lines = a.plan->segment > 0 && a.plan->lines5 > 0;
  const bool second_pass = a.plan->storage == Storage::kInt8 && a.rows > Simd::kGemvRows;
  if (across_lines || second_pass) return gemm<Simd, kBlockCodes, kBlockInt8>(a);
  gemv<Simd>(a);
}

template <class Simd>
constexpr Kernels make_kernels(const char* name) {
  return Kernels{name,
                 Simd::kGemvRows * Simd::kGemvPasses,
                 prepare,
                 gemv_or_gemm<Simd, block<Simd, false>, block<Simd, true>>,
                 gemm<Simd, block<Simd, false>, block<Simd, true>>,
                 finish<Simd::kInt8Offset>};
}

}  // namespace
}  // namespace sparse_backend::lowbit

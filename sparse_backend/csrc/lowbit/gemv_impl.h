// The SIMD kernels, written once over a `Simd` policy that each instruction set's file
// defines. A policy has:
//
//   Reg, kParts        a line of 16 dword lanes is kParts registers
//   kGemvRows          rows of activations whose sums fit the registers beside the codes
//   kGemvPasses        batches of up to so many passes of kGemvRows are faster with `gemv`
//   slot_sums(rows)    1, 2 or 4: sums per row of activations that the registers have room for
//   kGemvPanels        panels read side by side for one row of activations
//   kTilePanels, kGemmTile  panels and rows of activations in the register tile of `gemm`
//   kLines2, kLines5   lines whose narrow sums cannot overflow before widen()
//   kSteps             the same in steps of 4 columns of decoded codes
//   load, store, zero, broadcast
//   code2<slot>(line)  codes of one slot of a 2-bit line, 0..2 in every byte
//   codes5(line, out)  codes of all slots of a five-trit line
//   dot(sum, codes, x) adds four products per lane; sums may be narrower than int32
//   widen(total, sum)  total + sum as int32
//   dot8(total, line, x)  four int8 weights per lane, always int32
//   kInt8Offset        what dot8 adds to each int8 weight: 128, or 0
//   Single             sums of one row of activations, that may skip normalising the codes
#pragma once

#include "../prefetch.h"
#include "common_impl.h"

namespace sparse_backend::lowbit {
namespace {

// One core alone reaches the memory's limit only when it asks this far ahead.
constexpr int kPrefetchBytes = 8192;

// kToL2: where panels are read one after the other, or int8 weights by the first of several rows' passes.
template <bool kToL2 = false>
inline void prefetch(const uint8_t* line) {
  if constexpr (kToL2) {
    prefetch_l2(line, kPrefetchBytes);
  } else {
    sparse_backend::prefetch(line, kPrefetchBytes);
  }
}

template <class Simd, int kRows>
struct Totals {
  typename Simd::Reg reg[kRows][Simd::kParts];
  inline void clear() {
    for (int r = 0; r < kRows; ++r) {
      for (int p = 0; p < Simd::kParts; ++p) reg[r][p] = Simd::zero();
    }
  }
  inline void widen(const Totals& narrow) {
    for (int r = 0; r < kRows; ++r) {
      for (int p = 0; p < Simd::kParts; ++p) reg[r][p] = Simd::widen(reg[r][p], narrow.reg[r][p]);
    }
  }
  inline void store(int32_t* out, int64_t row_stride) const {
    for (int r = 0; r < kRows; ++r) {
      for (int p = 0; p < Simd::kParts; ++p) {
        Simd::store(out + r * row_stride + p * (kPanelRows / Simd::kParts), reg[r][p]);
      }
    }
  }
};

inline int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }

// Sums per row of activations: a slot's waits for no other slot's where the registers have room for all.
template <class Simd, int kRows>
struct SlotSums {
  static constexpr int kSets = Simd::slot_sums(kRows);
  Totals<Simd, kRows> set[kSets];
  inline void clear() {
#pragma GCC unroll 4
    for (int s = 0; s < kSets; ++s) set[s].clear();
  }
  inline void widen_into(Totals<Simd, kRows>& total) const {
#pragma GCC unroll 4
    for (int s = 0; s < kSets; ++s) total.widen(set[s]);
  }
};

template <class Simd, int kRows, int kSlot>
inline void slot2(const typename Simd::Reg line[], const int8_t* x, int64_t stride,
                  SlotSums<Simd, kRows>& sums) {
  auto& sum = sums.set[kSlot % sums.kSets];
  typename Simd::Reg codes[Simd::kParts];
#pragma GCC unroll 2
  for (int p = 0; p < Simd::kParts; ++p) codes[p] = Simd::template code2<kSlot>(line[p]);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const auto xv = Simd::broadcast(x + r * stride + 4 * kSlot);
#pragma GCC unroll 2
    for (int p = 0; p < Simd::kParts; ++p) sum.reg[r][p] = Simd::dot(sum.reg[r][p], codes[p], xv);
  }
}

// 2-bit lines times kRows rows of activations. The activations of line i are at x + 16 i.
template <class Simd, int kRows>
inline void lines2(const uint8_t* w, const int8_t* x, int64_t stride, int64_t lines,
                   Totals<Simd, kRows>& total) {
  while (lines > 0) {
    const int64_t count = at_most(lines, Simd::kLines2);
    SlotSums<Simd, kRows> sum;
    sum.clear();
    for (int64_t i = 0; i < count; ++i, w += kLine, x += 16) {
      prefetch(w);
      typename Simd::Reg line[Simd::kParts];
      for (int p = 0; p < Simd::kParts; ++p) line[p] = Simd::load(w + p * (kLine / Simd::kParts));
      slot2<Simd, kRows, 0>(line, x, stride, sum);
      slot2<Simd, kRows, 1>(line, x, stride, sum);
      slot2<Simd, kRows, 2>(line, x, stride, sum);
      slot2<Simd, kRows, 3>(line, x, stride, sum);
    }
    sum.widen_into(total);
    lines -= count;
  }
}

// Five-trit lines of span 4: the activations of line i are at x + 20 i.
template <class Simd, int kRows>
inline void lines5(const uint8_t* w, const int8_t* x, int64_t stride, int64_t lines,
                   Totals<Simd, kRows>& total) {
  while (lines > 0) {
    const int64_t count = at_most(lines, Simd::kLines5);
    SlotSums<Simd, kRows> sum;
    sum.clear();
    for (int64_t i = 0; i < count; ++i, w += kLine, x += 20) {
      prefetch(w);
#pragma GCC unroll 2
      for (int p = 0; p < Simd::kParts; ++p) {
        typename Simd::Reg codes[5];
        Simd::codes5(Simd::load(w + p * (kLine / Simd::kParts)), codes);
#pragma GCC unroll 5
        for (int slot = 0; slot < 5; ++slot) {
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
            const auto xv = Simd::broadcast(x + r * stride + 4 * slot);
            auto& reg = sum.set[slot % sum.kSets].reg[r][p];
            reg = Simd::dot(reg, codes[slot], xv);
          }
        }
      }
    }
    sum.widen_into(total);
    lines -= count;
  }
}

template <class Simd, int kRows, bool kToL2 = false>
inline void lines8(const uint8_t* w, const int8_t* x, int64_t stride, int64_t lines,
                   Totals<Simd, kRows>& total) {
  for (int64_t i = 0; i < lines; ++i, w += kLine, x += 4) {
    prefetch<kToL2>(w);
#pragma GCC unroll 2
    for (int p = 0; p < Simd::kParts; ++p) {
      const auto line = Simd::load(w + p * (kLine / Simd::kParts));
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        total.reg[r][p] = Simd::dot8(total.reg[r][p], line, Simd::broadcast(x + r * stride));
      }
    }
  }
}

// A whole panel times kRows rows of activations: one sum, or one per column group.
template <class Simd, int kRows>
void panel_rows(const UnitArgs& a, int panel, int first) {
  const Plan& plan = *a.plan;
  const uint8_t* w = a.panel[panel];
  const int8_t* x = a.x + first * a.x_stride;
  int32_t* out = a.out + first * kUnitRows + panel * kPanelRows;
  alignas(64) uint8_t tail[kLine];
  Totals<Simd, kRows> total;
  total.clear();
  if (plan.storage == Storage::kInt8) {
    a.one_stream ? lines8<Simd, kRows, true>(w, x, a.x_stride, plan.lines8, total)
                 : lines8<Simd, kRows, false>(w, x, a.x_stride, plan.lines8, total);
    return total.store(out, kUnitRows);
  }
  int64_t lines = plan.lines2;
  const int64_t group = plan.segment > 0 ? plan.segment / 16 : lines + 1;
  lines5<Simd, kRows>(w, x, a.x_stride, plan.lines5, total);
  w += plan.lines5 * kLine;
  x += plan.lines5 * 20;
  for (int64_t s = 0; s < plan.segments; ++s) {
    const int64_t count = at_most(lines, group);
    lines2<Simd, kRows>(w, x, a.x_stride, count, total);
    w += count * kLine;
    x += count * 16;
    lines -= count;
    if (s + 1 == plan.segments && plan.tail_bytes > 0) {
      expand_tail(w, plan.tail_bytes, tail);
      lines2<Simd, kRows>(tail, x, a.x_stride, 1, total);
    }
    total.store(out + s * a.rows * kUnitRows, kUnitRows);
    total.clear();
  }
}

// The same for one row of activations, where codes need not be normalised, and for kPanels
// panels at a time, so that memory is asked for in more than one place.
template <class Simd, int kPanels>
void panel_single(const UnitArgs& a, int panel) {
  using Single = typename Simd::Single;
  const Plan& plan = *a.plan;
  const int8_t* x = a.x;
  const uint8_t* w[kPanels];
  Totals<Simd, 1> total[kPanels];
  Single sum[kPanels];
#pragma GCC unroll 2
  for (int p = 0; p < kPanels; ++p) {
    w[p] = a.panel[panel + p];
    total[p].clear();
    sum[p].clear();
  }
  const auto flush = [&] {
#pragma GCC unroll 2
    for (int p = 0; p < kPanels; ++p) sum[p].flush(total[p].reg[0]);
  };
  for (int64_t left = plan.lines5; left > 0;) {
    const int64_t count = at_most(left, Single::kLines5);
    for (int64_t i = 0; i < count; ++i, x += 20) {
#pragma GCC unroll 2
      for (int p = 0; p < kPanels; ++p) {
        prefetch<kPanels == 1>(w[p]);
        sum[p].line5(w[p], x);
        w[p] += kLine;
      }
    }
    flush();
    left -= count;
  }
  int64_t lines = plan.lines2;
  const int64_t group = plan.segment > 0 ? plan.segment / 16 : lines + 1;
  for (int64_t s = 0; s < plan.segments; ++s) {
    int64_t left = at_most(lines, group);
    lines -= left;
    while (left > 0) {
      const int64_t count = at_most(left, Single::kLines2);
      for (int64_t i = 0; i < count; ++i, x += 16) {
#pragma GCC unroll 2
        for (int p = 0; p < kPanels; ++p) {
          prefetch<kPanels == 1>(w[p]);
          sum[p].line2(w[p], x);
          w[p] += kLine;
        }
      }
      flush();
      left -= count;
    }
    for (int p = 0; p < kPanels; ++p) {
      if (s + 1 == plan.segments && plan.tail_bytes > 0) {
        alignas(64) uint8_t tail[kLine];
        expand_tail(w[p], plan.tail_bytes, tail);
        sum[p].line2(tail, x);
        sum[p].flush(total[p].reg[0]);
      }
      total[p].store(a.out + s * kUnitRows + (panel + p) * kPanelRows, kUnitRows);
      total[p].clear();
    }
  }
}

// Both panels of a unit of int8 weights side by side: memory delivers two streams faster than one.
template <class Simd, int kRows>
void panels8(const UnitArgs& a, int first) {
  const int8_t* x = a.x + first * a.x_stride;
  const uint8_t* w[kUnitPanels];
  Totals<Simd, kRows> total[kUnitPanels];
#pragma GCC unroll 2
  for (int p = 0; p < kUnitPanels; ++p) {
    w[p] = a.panel[p];
    total[p].clear();
  }
  for (int64_t i = 0; i < a.plan->lines8; ++i, x += 4) {
#pragma GCC unroll 2
    for (int p = 0; p < kUnitPanels; ++p) {
      lines8<Simd, kRows>(w[p], x, a.x_stride, 1, total[p]);
      w[p] += kLine;
    }
  }
#pragma GCC unroll 2
  for (int p = 0; p < kUnitPanels; ++p) {
    total[p].store(a.out + first * kUnitRows + p * kPanelRows, kUnitRows);
  }
}

template <class Simd, int kRows = 1>
void panels8_some(const UnitArgs& a, int first, int rows) {
  if (rows == kRows) return panels8<Simd, kRows>(a, first);
  if constexpr (2 * kRows < Simd::kGemvRows) panels8_some<Simd, kRows + 1>(a, first, rows);
}

template <class Simd, int kRows = 1>
void panel_some(const UnitArgs& a, int panel, int first, int rows) {
  if (rows == kRows) return panel_rows<Simd, kRows>(a, panel, first);
  if constexpr (kRows < Simd::kGemvRows) panel_some<Simd, kRows + 1>(a, panel, first, rows);
}

template <class Simd>
void gemv(const UnitArgs& a) {
  if (a.rows == 1 && a.plan->storage != Storage::kInt8) {
    int panel = 0;
    for (; !a.one_stream && panel + Simd::kGemvPanels <= a.panels; panel += Simd::kGemvPanels) {
      panel_single<Simd, Simd::kGemvPanels>(a, panel);
    }
    for (; panel < a.panels; ++panel) panel_single<Simd, 1>(a, panel);
    return;
  }
  const bool both = a.panels == kUnitPanels && 2 * a.rows <= Simd::kGemvRows && !a.one_stream;
  if (a.plan->storage == Storage::kInt8 && both) {
    return panels8_some<Simd>(a, 0, a.rows);
  }
  // Passes of equal height: 12 rows are 6 and 6, not 8 and 4.
  const int passes = (a.rows + Simd::kGemvRows - 1) / Simd::kGemvRows;
  const int height = (a.rows + passes - 1) / passes;
  for (int panel = 0; panel < a.panels; ++panel) {
    // The second and later passes over a panel find it in the L1 or L2 cache.
    for (int first = 0; first < a.rows; first += height) {
      panel_some<Simd>(a, panel, first, static_cast<int>(at_most(a.rows - first, height)));
    }
  }
}

}  // namespace
}  // namespace sparse_backend::lowbit

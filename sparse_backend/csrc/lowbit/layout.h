// The machine form of small-integer weights: ternary at 2 or 1.6 bits, and int8.
//
//   header   64 bytes
//   panels   16 output rows each, the last one padded with zero weights; a panel is
//            a run of 64-byte lines. In every line, dword lane = row, byte = column % 4.
//
// A weight is stored as an unsigned code: w + 1 (0, 1, 2) for ternary, w + 128 for int8.
// Products of codes and activations are exact integers; finish() takes the sum of the
// activations, times the offset, off again.
//
//   five-trit lines  only at 1.6 bits. A byte is t0 + 3 t1 + 9 t2 + 27 t3 + 81 t4 of five
//                    codes `span` columns apart: a block of 5 * span columns takes span / 4
//                    lines. span is 4, or 32 when scales stand for groups of columns, so that
//                    every code of a column group is in the same slot.
//   2-bit lines      the other columns, 16 per line: code s of byte j is column 4 s + j.
//   tail             the last K % 16 of those, ceil(K % 16 / 4) bytes per row, row by row, four
//                    columns to a byte in order.
//   int8 lines       only at 8 bits: 4 columns per line, padded.
//
// The line for one broadcast dword of activations, and the sums that stay in their lane, are
// what keeps a dot-product instruction fed; see kernels.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "../common.h"

namespace sparse_backend::lowbit {

constexpr int kPanelRows = 16;
constexpr int kLine = 64;
constexpr int kSpan = 4;
constexpr int kGroupSpan = 32;
constexpr int64_t kHeaderBytes = 64;
// Codes times activations are summed in int32: 255 * 127 * 65536 < 2^31.
constexpr int64_t kMaxColumns = 65536;
constexpr uint32_t kMagic = 0x4C424253;  // "SBBL"

// How weights are stored, named by how many share a byte.
enum class Storage : int32_t { kInt8 = 1, kTwoBits = 4, kFiveTrits = 5 };

struct Header {
  uint32_t magic;
  Storage storage;
  int64_t out_features, in_features;
  int32_t group_size;  // columns per scale; 0: one scale per row (or per weight)
  int32_t limbs;       // int8 numbers an activation is split into: 1, 2 or 3
};

// How the columns of a panel are cut into lines.
struct Plan {
  Storage storage;
  int64_t columns;  // in_features
  int64_t padded;   // bytes of a prepared row of activations, a multiple of 64
  int span;
  int64_t lines5, lines2, lines8;
  int tail_bytes;  // per row
  int64_t panel_bytes;
  int64_t segment;   // columns that share a sum, 0: all
  int64_t segments;  // sums per output
};

namespace {

inline Plan make_plan(Storage storage, int64_t in_features, int64_t group_size) {
  Plan p{};
  p.storage = storage;
  p.columns = in_features;
  p.padded = round_up(in_features, 64);
  p.span = group_size > 0 ? kGroupSpan : kSpan;
  int64_t rest = in_features;
  if (storage == Storage::kInt8) {
    p.lines8 = (in_features + 3) / 4;
    rest = 0;
  } else if (storage == Storage::kFiveTrits) {
    const int64_t blocks = in_features / (5 * p.span);
    p.lines5 = blocks * p.span / 4;
    rest = in_features - blocks * 5 * p.span;
  }
  p.lines2 = rest / 16;
  p.tail_bytes = static_cast<int>((rest % 16 + 3) / 4);
  p.panel_bytes = kLine * (p.lines5 + p.lines2 + p.lines8) + kPanelRows * p.tail_bytes;
  if (group_size > 0) p.segment = storage == Storage::kFiveTrits ? kGroupSpan : group_size;
  p.segments = group_size > 0 && in_features > 0 ? (in_features + p.segment - 1) / p.segment : 1;
  return p;
}

inline int64_t panel_count(int64_t out_features) { return (out_features + kPanelRows - 1) / kPanelRows; }

inline int64_t machine_bytes(const Plan& plan, int64_t out_features) {
  return kHeaderBytes + panel_count(out_features) * plan.panel_bytes;
}

// A 2-bit line from a tail: what is missing holds code 0, and meets activations that are 0. In a
// tail byte b holds columns 4 b to 4 b + 3; a line has those in its bytes 0 to 3, at slot b: the
// four by four codes of a row's dword are transposed.
inline void expand_tail(const uint8_t* tail, int tail_bytes, uint8_t line[kLine]) {
  uint32_t dwords[kPanelRows] = {};
  for (int r = 0; r < kPanelRows; ++r) std::memcpy(dwords + r, tail + r * tail_bytes, tail_bytes);
  for (uint32_t& d : dwords) {
    const uint32_t pairs = (d ^ (d >> 6)) & 0x00CC00CCU;
    d ^= pairs ^ (pairs << 6);
    const uint32_t fours = (d ^ (d >> 12)) & 0x0000F0F0U;
    d ^= fours ^ (fours << 12);
  }
  std::memcpy(line, dwords, kLine);
}

}  // namespace
}  // namespace sparse_backend::lowbit

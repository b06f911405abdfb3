// The sell stream of a machine form (unstructured/buffer.h): sorted row slices, for weights so
// sparse that work per position does not pay any more. Cut into strips of 64 rows:
//
//   per block of 128 columns:
//     BlockHeader   70 bytes
//     active        steps bytes: how many rows of the slice still have entries at this step
//     columns       entries bytes, 0..127
//     one run       of as many values (unstructured/values.h)
//   `active` and the run are padded to an even number of bytes: 16-bit values stand at even addresses.
//
// In a block the rows are sorted by their number of entries, most first, and cut into 2 slices of
// 32. A step of a slice holds two entries of each of its active rows, which are the first ones: row
// after row, so that 64 bytes are the columns of a step, and their halves those of 8 rows each. A row with an
// odd number of entries ends in a zero at column 0. SELL-C-sigma (Kreutzer et al., 2014) pads slices; here
// steps shrink instead, so sorting saves steps and costs no bytes.
//
// Layouts tried on Zen 5 (17408 x 5120, 90% zeros, bf16 in 12 bits, one thread, batch 1 | 8, ms): these
// slices of 32 rows, columns looked up as bytes, 0.59 | 1.9; slices of 16 rows, columns widened and looked up
// as words in four registers, 1.09 | 6.8 (the same bytes); the first one's 4 or 8 strips block by block in
// turn, 0.75 | 1.9.
#pragma once

#include <cstdint>

namespace sparse_backend::sell {

constexpr int kStripRows = 64;
constexpr int kSliceRows = 32;
constexpr int kSlices = kStripRows / kSliceRows;
constexpr int kBlockColumns = 128;
constexpr int kMostSteps = kSlices * kBlockColumns / 2;
constexpr int kMostEntries = kStripRows * kBlockColumns;
constexpr uint64_t kMagic = 0x32304C4C45534253ULL;  // "SBSELL02", little endian

struct BlockHeader {
  uint8_t rank[kStripRows];  // of each row: slice * kSliceRows + slot(place in the sorted order)
  uint8_t steps[kSlices];
  uint16_t entries;
  uint16_t all_steps;
};
static_assert(sizeof(BlockHeader) == 70, "no padding");

namespace {

// Where the sums of the row at place `p` of a slice stand among the 32 of it. Unpacking two registers of
// bytes leaves four rows of each eight in the first result, four in the second (avx512_gemv.h).
constexpr int slot(int p) { return p % 8 / 4 * 16 + p / 8 * 4 + p % 4; }

}  // namespace

}  // namespace sparse_backend::sell

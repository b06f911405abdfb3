// The sell stream of a machine form (unstructured/buffer.h): sorted row slices, for weights so
// sparse that work per position does not pay any more. Cut into strips of 64 rows:
//
//   per block of 128 columns:
//     BlockHeader   72 bytes
//     active        steps bytes: how many rows of the slice still have entries at this step
//     columns       entries bytes, 0..127
//     one run       of as many values (unstructured/values.h)
//   `active` and the run are padded to an even number of bytes: 16-bit values stand at even addresses.
//
// In a block the rows are sorted by their number of entries, most first, and cut into 4 slices of
// 16. A step of a slice holds two entries of each of its active rows, which are the first ones: row
// after row, so that a 32-bit lane is one row. A row with an odd number of entries ends in a zero
// at column 0. SELL-C-sigma (Kreutzer et al., 2014) pads slices; here steps shrink instead, so
// sorting saves steps and costs no bytes.
#pragma once

#include <cstdint>

namespace sparse_backend::sell {

constexpr int kStripRows = 64;
constexpr int kSliceRows = 16;
constexpr int kSlices = kStripRows / kSliceRows;
constexpr int kBlockColumns = 128;
constexpr int kMostSteps = kSlices * kBlockColumns / 2;
constexpr int kMostEntries = kStripRows * kBlockColumns;
constexpr uint64_t kMagic = 0x31304C4C45534253ULL;  // "SBSELL01", little endian

struct BlockHeader {
  uint8_t rank[kStripRows];  // of each row in the sorted order
  uint8_t steps[kSlices];
  uint16_t entries;
  uint16_t all_steps;
};
static_assert(sizeof(BlockHeader) == 72, "no padding");

}  // namespace sparse_backend::sell

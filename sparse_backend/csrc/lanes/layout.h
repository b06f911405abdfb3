// The lanes stream of a machine form (unstructured/buffer.h): blocks of 16 rows by 16 columns, all of
// them (dense weights) or those that hold anything. Cut into strips of 16 rows:
//
//   uint16 count - 1, then the stored blocks' numbers (column / 16) in ascending order; padded to 64 bytes
//   per stored block: one run of 256 values (unstructured/values.h), in the order that value_at() gives
//
// A strip without blocks is 0 bytes. A 32-bit lane is a row: no sum crosses lanes, a column's
// activation is one broadcast, and a block's place in memory is known without reading the ones before.
#pragma once

#include <cstdint>

#include "../unstructured/strips.h"

namespace sparse_backend::lanes {

using unstructured::kStripRows;
using unstructured::Values;

constexpr int kBlockColumns = 16;
constexpr int kBlockWeights = kStripRows * kBlockColumns;
constexpr int64_t kMaxColumns = int64_t{65536} * kBlockColumns;
constexpr uint64_t kMagic = 0x3130454E414C4253ULL;  // "SBLANE01", little endian

struct Place {
  int row, column;
};

namespace {

// Where in its block value `i` of a run stands. Every kind of values has the order in which its decoder
// finds whole vectors: 16 rows of one column, or of two neighbouring columns in a lane.
constexpr Place value_at(Values values, int i) {
  switch (values) {
    case Values::kFp16:  // converted sixteen at a time
      return {i % 16, i / 16};
    case Values::kBf16x12: {  // vpunpck takes 8 low bytes of a 128-bit lane, then the other 8
      const int lane = i % 64 / 16, pair = i % 16 / 8;
      return {4 * lane + i % 8 / 2, 4 * (i / 64) + 2 * pair + i % 2};
    }
    case Values::kInt4: {  // the four half bytes of a word are neighbouring pairs of columns
      const int word = i / 4, pair = 4 * (word / 32) + i % 4;
      return {word % 32 / 2, 2 * pair + word % 2};
    }
    default:  // bf16, int8: pairs of columns
      return {i % 32 / 2, 2 * (i / 32) + i % 2};
  }
}

constexpr int64_t list_bytes(int64_t count) { return (2 + 2 * count + 63) / 64 * 64; }

}  // namespace
}  // namespace sparse_backend::lanes

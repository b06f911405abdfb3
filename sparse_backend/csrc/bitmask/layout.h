// The bitmask stream of a machine form (unstructured/buffer.h), cut into panels of 4 rows:
//
//   per chunk of 64 columns:
//     4 x uint64  masks, bit j of mask r set = weight (r, 64 c + j) stored
//     one run     the stored weights of row 0, then of rows 1, 2 and 3 (unstructured/values.h)
//
// Masks stand in the stream beside their values so that a thread reads one sequential
// run of memory: the position of the next chunk follows from four population counts.
// Rows past N and columns past K have zero mask bits and cost no values.
#pragma once

#include <cstdint>

namespace sparse_backend::bitmask {

constexpr int kPanelRows = 4;
constexpr int kChunk = 64;
constexpr uint64_t kMagic = 0x32304B5354494253ULL;  // "SBITSK02", little endian

}  // namespace sparse_backend::bitmask

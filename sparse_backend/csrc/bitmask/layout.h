// The bitmask stream of a machine form (unstructured/buffer.h), cut into strips of 16 rows:
//
//   per chunk of 64 columns:
//     128 bytes   masks: of 32 bits, each for two columns, or for kBf16x12 and integers of 64 bits, for four.
//     A set
//                 bit is a stored weight; place_of() says which.
//     per mask    a run of its stored weights, in the order of its bits (unstructured/values.h)
//
// So what an expand instruction makes of one mask is a vector with a row in each 32-bit lane, and its
// products with the columns' activations, a broadcast, add up in one register from the first column to
// the last: no sum crosses lanes, and nothing is read again or stored between. A row's mask of 64 columns and
// a sum across lanes at the end, the layout before, took 1.3 to 2 times as long on Zen 5 (17408 x 5120, one
// thread, 50 | 75 | 90% zeros, ms: 4.2 | 3.6 | 3.6, now 2.8 | 1.9 | 1.85), and 2.2 times for 8 tokens. Masks
// stand in the stream beside their values so that a thread reads one sequential run of memory. Rows past N
// and columns past K have zero mask bits and cost no values.
#pragma once

#include <cstdint>

#include "../unstructured/strips.h"

namespace sparse_backend::bitmask {

using unstructured::kStripRows;
using unstructured::Values;

constexpr int kChunk = 64;
constexpr int kChunkWeights = kStripRows * kChunk;
constexpr int kMaskBytes = kChunkWeights / 8;       // of a chunk
constexpr uint64_t kMagic = 0x33304B5354494253ULL;  // "SBITSK03", little endian

struct Place {
  int row, column;
};

namespace {

// Columns that one mask stands for.
constexpr int mask_columns(Values values) {
  return unstructured::is_integer(values) || values == Values::kBf16x12 ? 4 : 2;
}

// Which weight bit `bit` of a mask is.
constexpr Place place_of(Values values, int bit) {
  if (unstructured::is_integer(values)) return {bit / 4, bit % 4};
  // Two registers of bytes unpacked: four rows of two columns from each eight bytes, alternately.
  if (values == Values::kBf16x12) return {bit / 16 * 4 + bit % 8 / 2, bit / 8 % 2 * 2 + bit % 2};
  return {bit / 2, bit % 2};
}

}  // namespace
}  // namespace sparse_backend::bitmask

// Canonical ternary codes (portable) and the machine form (layout.h).
//
// Canonical codes are [N, ceil(K / per_byte)] bytes, row by row: four 2-bit codes per byte, lowest
// bits first, or five trits as base-3 digits, least significant first. A code is w + 1.
#pragma once

#include "layout.h"

namespace sparse_backend::lowbit {

inline int64_t canonical_stride(int64_t in_features, int per_byte) {
  return (in_features + per_byte - 1) / per_byte;
}

// Whether every group of `group` columns (the last one may be shorter) of every row of a dense
// weight [N, K] is -s, 0, +s; fills codes [N, K] with -1, 0, 1 and scales [N, groups], of the
// weight's type, with s (0 where all are zero). NaN and infinity are never ternary.
bool scan_ternary(const void* weight, DType type, int64_t n, int64_t k, int64_t group, int8_t* codes,
                  void* scales, const ThreadPool& pool);

// codes [N, K] of -1, 0, 1 to canonical bytes; returns how many codes were something else.
int64_t encode(const int8_t* codes, int64_t n, int64_t k, int per_byte, uint8_t* out, const ThreadPool& pool);

// The other way; returns how many bytes hold no code: 3 in two bits, 243 to 255, or something
// past the last column.
int64_t decode(const uint8_t* packed, int64_t n, int64_t k, int per_byte, int8_t* codes,
               const ThreadPool& pool);

// weights [N, K] (-1, 0, 1, or -127..127 for int8) to the machine form; `out` has machine_bytes().
// Returns how many rows hold weights out of range.
int64_t lower(const int8_t* weights, const Header& header, uint8_t* out, const ThreadPool& pool);

// Reads and checks the header of a machine form; returns what is wrong, or nullptr.
const char* parse(const uint8_t* data, int64_t bytes, Header* header);

}  // namespace sparse_backend::lowbit

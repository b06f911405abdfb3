// Conversions between a dense weight, the canonical form (mask, values) and the machine
// form of layout.h. All are exact; none allocates the caller's buffers.
//
// Canonical form: mask [N, ceil(K / 8)] bytes, bit j of byte b of row n set when weight
// (n, 8 b + j) is stored; values: the stored weights, row by row. Zeros of either sign
// are not stored.
#pragma once

#include <cstdint>

#include "../common.h"

namespace sparse_backend::bitmask {

inline int64_t mask_stride(int64_t in_features) { return (in_features + 7) / 8; }

struct Canonical {
  int64_t out_features;
  int64_t in_features;
  DType value_type;
  const uint8_t* mask;
  const uint16_t* values;
  int64_t nnz;
};

// Fills mask and row_nnz[N]; returns how many weights are NaN or infinite.
int64_t pack_mask(const uint16_t* dense, DType type, int64_t rows, int64_t columns, uint8_t* mask,
                  int64_t* row_nnz, const ThreadPool& pool);

// Writes the values of every row, row n starting at values + row_start[n].
void pack_values(const uint16_t* dense, int64_t rows, int64_t columns, const int64_t* row_start,
                 uint16_t* values, const ThreadPool& pool);

// row_start[0..N]: exclusive sums of the mask's population counts. Returns false if bits
// past the last column are set.
bool row_starts(const uint8_t* mask, int64_t rows, int64_t columns, int64_t* row_start,
                const ThreadPool& pool);

// Writes the dense weight [N, K]; `row_start` as above.
void unpack(const Canonical& weight, const int64_t* row_start, uint16_t* dense, const ThreadPool& pool);

// Bytes of the machine form.
int64_t machine_bytes(int64_t out_features, int64_t in_features, int64_t nnz);

// Writes the machine form; `row_start` as above.
void lower(const Canonical& weight, const int64_t* row_start, uint8_t* buffer, const ThreadPool& pool);

// How many of `count` 16-bit floats are neither +0 nor -0.
int64_t count_nonzero(const uint16_t* values, int64_t count, const ThreadPool& pool);

}  // namespace sparse_backend::bitmask

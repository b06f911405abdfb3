// Conversions between a dense weight and the canonical form (unstructured/pack.h), and the
// stream of the machine form (layout.h). All are exact; none allocates the caller's buffers.
#pragma once

#include <cstdint>

#include "../unstructured/pack.h"

namespace sparse_backend::bitmask {

using unstructured::Canonical;
using unstructured::Encoding;
using unstructured::mask_stride;

// Fills mask and row_nnz[N]; returns how many weights are NaN or infinite.
int64_t pack_mask(const uint16_t* dense, DType type, int64_t rows, int64_t columns, uint8_t* mask,
                  int64_t* row_nnz, const ThreadPool& pool);

// Writes the values of every row, row n starting at values + row_start[n].
void pack_values(const uint16_t* dense, int64_t rows, int64_t columns, const int64_t* row_start,
                 uint16_t* values, const ThreadPool& pool);

// Writes the dense weight [N, K] of 16-bit values; `row_start` from unstructured::row_starts.
void unpack(const Canonical& weight, const int64_t* row_start, uint16_t* dense, const ThreadPool& pool);

extern const unstructured::Stream kStream;

// How many of `count` 16-bit floats are neither +0 nor -0.
int64_t count_nonzero(const uint16_t* values, int64_t count, const ThreadPool& pool);

}  // namespace sparse_backend::bitmask

// From rows to strip order: the stored weights of 16 rows and 64 columns as the stream has them (layout.h).
#pragma once

#include <cstdint>

#include "layout.h"

namespace sparse_backend::bitmask {

template <class Value>
struct ChunkRows {
  uint64_t mask[kStripRows];        // bit c: column c is stored
  const Value* values[kStripRows];  // a row's stored weights of these columns; not read where none is
  const Value* last;                // of all weights there are: memory that may be read
};

// All write kMaskBytes of masks, and the weights to `out`, which has room for kChunkWeights and 64 bytes
// more; they return how many. A weight that is a stored float zero may be left out, its mask bit too.
struct OrderKernels {
  int (*words)(const ChunkRows<uint16_t>& rows, uint8_t* masks, uint16_t* out);
  int (*coded)(const ChunkRows<uint16_t>& rows, uint8_t* masks, uint16_t* out);  // as kBf16x12 has them
  int (*bytes)(const ChunkRows<int8_t>& rows, uint8_t* masks, int8_t* out);
};

#if defined(__x86_64__)
const OrderKernels& avx512_order_kernels();
#endif

}  // namespace sparse_backend::bitmask

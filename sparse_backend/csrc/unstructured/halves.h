// Two int4 codes in a byte: the first in the low half, two's complement.
#pragma once

#include <cstdint>

#include "../parallel.h"

namespace sparse_backend::unstructured {

// Rows of `columns` codes -8..7 into rows of ceil(columns / 2) bytes.
inline void join_halves(const int8_t* codes, int64_t rows, int64_t columns, uint8_t* out,
                        const ThreadPool& pool) {
  const int64_t stride = (columns + 1) / 2;
  parallel_ranges(pool, rows, 65536 / (columns + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int8_t* in = codes + row * columns;
      uint8_t* to = out + row * stride;
      for (int64_t i = 0; i < columns / 2; ++i) {
        to[i] = static_cast<uint8_t>((in[2 * i] & 15) | (in[2 * i + 1] & 15) << 4);
      }
      if (columns % 2 != 0) to[stride - 1] = static_cast<uint8_t>(in[columns - 1] & 15);
    }
  });
}

// The reverse.
inline void split_halves(const uint8_t* bytes, int64_t rows, int64_t columns, int8_t* out,
                         const ThreadPool& pool) {
  const int64_t stride = (columns + 1) / 2;
  const auto code = [](int half) { return static_cast<int8_t>((half ^ 8) - 8); };
  parallel_ranges(pool, rows, 65536 / (columns + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const uint8_t* in = bytes + row * stride;
      int8_t* to = out + row * columns;
      for (int64_t i = 0; i < columns / 2; ++i) {
        to[2 * i] = code(in[i] & 15);
        to[2 * i + 1] = code(in[i] >> 4);
      }
      if (columns % 2 != 0) to[columns - 1] = code(in[stride - 1] & 15);
    }
  });
}

}  // namespace sparse_backend::unstructured

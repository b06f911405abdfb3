// From the canonical form (mask, values) to the machine forms: what the formats share.
//
// Canonical form: mask [N, ceil(K / 8)] bytes, bit j of byte b of row n set when weight
// (n, 8 b + j) is stored; values: the stored weights, row by row. Zeros of either sign are not
// stored. A format supplies what writes one part of its stream.
#pragma once

#include <cstdint>
#include <vector>

#include "buffer.h"

namespace sparse_backend::unstructured {

inline int64_t mask_stride(int64_t in_features) { return (in_features + 7) / 8; }

struct Canonical {
  int64_t out_features;
  int64_t in_features;
  Values values;  // kBf16, kFp16, kInt8 or kInt4
  const uint8_t* mask;
  const void* data;  // 16-bit floats, or for integers one int8 per value
  int64_t nnz;

  uint16_t word(int64_t i) const {
    if (is_integer(values)) return static_cast<uint16_t>(static_cast<const int8_t*>(data)[i]);
    return static_cast<const uint16_t*>(data)[i];
  }
};

// How a buffer's values are written.
struct Encoding {
  Values values;
  ExponentTable exponents;
  uint8_t code_of[256];  // of each exponent; kEscapeCode for those without
  std::vector<uint32_t> escape_start;
  std::vector<Escape> escapes;

  // Appends a run of n values.
  void append(const uint16_t* words, int64_t n, std::vector<uint8_t>* out) const;
};

struct Settings {
  bool coded;  // bf16 as kBf16x12, unless more than 1 value in 1000 would be an escape
  int32_t group_size;
  int32_t activation_bits;
  int64_t scale_tile;  // rows whose scales stand together; 0: all
};

// A machine form before it is written.
struct Built {
  Header header;
  int64_t scale_tile;
  Encoding encoding;
  std::vector<std::vector<uint8_t>> parts;
};

// Appends part `part` to `out` and returns how many values it stored. `row_start` as below.
using WritePart = int64_t (*)(const Canonical& weight, const int64_t* row_start, const Encoding& encoding,
                              int64_t part, std::vector<uint8_t>* out);

// row_start[0..N]: exclusive sums of the mask's population counts. Returns false if bits past the
// last column are set.
bool row_starts(const uint8_t* mask, int64_t rows, int64_t columns, int64_t* row_start,
                const ThreadPool& pool);

Built build(const Canonical& weight, const int64_t* row_start, const Settings& settings, uint64_t magic,
            int64_t rows_per_part, WritePart write_part, const ThreadPool& pool);

// Writes header.total_bytes. `scales`: integer values: N x groups, row by row.
void write(const Built& built, const float* scales, uint8_t* buffer, const ThreadPool& pool);

// The machine form's stored 64 mask bits of one row from column `first` on.
uint64_t mask_bits(const Canonical& weight, int64_t row, int64_t first);

}  // namespace sparse_backend::unstructured

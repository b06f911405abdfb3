// From the canonical form (mask, values) to the machine forms: what the formats share.
//
// Canonical form: mask [N, ceil(K / 8)] bytes, bit j of byte b of row n set when weight
// (n, 8 b + j) is stored; values: the stored weights, row by row. Zeros of either sign are not
// stored. A format supplies what writes one part of its stream.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "buffer.h"

namespace sparse_backend::unstructured {

inline int64_t mask_stride(int64_t in_features) { return (in_features + 7) / 8; }

struct Canonical {
  int64_t out_features;
  int64_t in_features;
  Values values;        // kBf16, kFp16, kInt8, kInt4; kBf16x12 for a dense weight that is coded already
  const uint8_t* mask;  // nullptr: everything is stored
  const void* data;     // 16-bit floats; for integers one int8 per value; kBf16x12: [N, K] low bytes
  int64_t nnz;
  const uint8_t* codes = nullptr;  // kBf16x12: [N, ceil(K / 2)] exponent codes

  uint16_t word(int64_t i) const {
    if (is_integer(values)) return static_cast<uint16_t>(static_cast<const int8_t*>(data)[i]);
    return static_cast<const uint16_t*>(data)[i];
  }

  // Words `first` to `first + count` of them.
  void words(int64_t first, int64_t count, uint16_t* out) const {
    if (!is_integer(values)) {
      if (count > 0) std::memcpy(out, static_cast<const uint16_t*>(data) + first, 2 * count);
      return;
    }
    const int8_t* in = static_cast<const int8_t*>(data) + first;
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<uint16_t>(in[i]);
  }
};

// How a buffer's values are written.
struct Encoding {
  Values values;
  ExponentTable exponents;
  uint8_t code_of[256];     // of each exponent; kEscapeCode for those without
  int first_exponent = -1;  // where the coded exponents are neighbours, and codes stand in their order
  std::vector<uint32_t> escape_start;
  std::vector<Escape> escapes;

  // The codes of n values; whether any is an escape.
  bool find_codes(const uint16_t* words, int64_t n, uint8_t* codes) const;

  // Writes a run of n values, run_bytes() long.
  void write(const uint16_t* words, int64_t n, uint8_t* run) const;
};

struct Settings {
  bool coded;  // bf16 as kBf16x12, unless more than 1 value in 1000 would be an escape
  int32_t group_size;
  int32_t activation_bits;
};

struct Part {
  int64_t bytes;
  int64_t stored;  // values
};

// What a format supplies: its stream, part by part.
struct Stream {
  uint64_t magic;
  int64_t rows_per_part;
  int64_t scale_tile;  // rows whose scales stand together; 0: all
  Part (*size)(const Canonical& weight, const int64_t* row_start, const Encoding& encoding, int64_t part);
  // Writes as many bytes as size() said.
  void (*write)(const Canonical& weight, const int64_t* row_start, const Encoding& encoding, int64_t part,
                uint8_t* out);
};

// A machine form before it is written.
struct Built {
  Header header;
  Stream stream;
  Encoding encoding;
  std::vector<uint64_t> offsets;
};

// row_start[0..N]: exclusive sums of the mask's population counts. Returns false if bits past the
// last column are set.
bool row_starts(const uint8_t* mask, int64_t rows, int64_t columns, int64_t* row_start,
                const ThreadPool& pool);

// Decides how values are coded, and where everything stands. A weight of kBf16x12 brings its `encoding`.
Built build(const Canonical& weight, const int64_t* row_start, const Settings& settings, const Stream& stream,
            Encoding encoding, const ThreadPool& pool);

// Writes header.total_bytes. `scales`: integer values: N x groups, row by row.
void write(const Built& built, const Canonical& weight, const int64_t* row_start, const float* scales,
           uint8_t* buffer, const ThreadPool& pool);

// The 64 mask bits of one row from column `first` on, a multiple of 8.
inline uint64_t mask_bits(const Canonical& weight, int64_t row, int64_t first) {
  if (weight.mask == nullptr) {
    const int64_t columns = weight.in_features - first;
    return columns >= 64 ? ~uint64_t{0} : columns > 0 ? (uint64_t{1} << columns) - 1 : 0;
  }
  const int64_t stride = mask_stride(weight.in_features), bytes = stride - first / 8;
  const uint8_t* at = weight.mask + row * stride + first / 8;
  uint64_t bits = 0;
  if (bytes >= 8) {
    std::memcpy(&bits, at, 8);
  } else if (bytes > 0) {
    std::memcpy(&bits, at, bytes);
  }
  return bits;
}

}  // namespace sparse_backend::unstructured

// The canonical form of dense bf16x12 weights [N, K]: 12 bits each, and a list of what does not fit.
//
//   low        [N, K] bytes: mantissa << 1 | sign
//   high       [N, ceil(K / 2)] bytes: exponent codes, column 2 i in the low half of byte i
//   exponents  [16] bytes: the exponent of codes 0..14, most frequent first; 0 at 15
//   escapes    weights of another exponent: code 15, low byte 0, and row, column, bits
#pragma once

#include <cstdint>
#include <vector>

#include "../unstructured/values.h"

namespace sparse_backend::lanes {

struct Escaped {
  int32_t row, column, bits;
};

// Fills low, high, exponents; returns the number of NaN and infinite weights (nothing else counts then).
int64_t encode_bf16x12(const uint16_t* weight, int64_t n, int64_t k, uint8_t* low, uint8_t* high,
                       unstructured::ExponentTable* exponents, std::vector<Escaped>* escapes,
                       const ThreadPool& pool);

void decode_bf16x12(const uint8_t* low, const uint8_t* high, const unstructured::ExponentTable& exponents,
                    int64_t n, int64_t k, uint16_t* weight, const ThreadPool& pool);

}  // namespace sparse_backend::lanes

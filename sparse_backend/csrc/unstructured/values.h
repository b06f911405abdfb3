// How the stored weights of a sparse matrix are written, whatever says where they stand.
//
// A run of n values is one of
//   kBf16, kFp16   n x 2 bytes
//   kBf16x12       n bytes `m << 1 | s` (mantissa and sign), then ceil(n / 2) bytes of exponent
//                  codes, value 2 i in the low half of byte i: 12 bits, lossless. Codes 0..14
//                  look the 8-bit exponent up in the header's table; a value with a rarer
//                  exponent is written as zero and stands in the buffer's list of escapes.
//   kInt8          n bytes
//   kInt4          ceil(n / 2) bytes, value 2 i in the low half of byte i, two's complement
//
// Kernels first decode a run into 16-bit words (bf16, fp16, or int16), then place the words.
#pragma once

#include <cstdint>

#include "../common.h"

namespace sparse_backend::unstructured {

enum class Values : int32_t { kBf16 = 0, kFp16 = 1, kBf16x12 = 2, kInt8 = 3, kInt4 = 4 };
constexpr int kValueKinds = 5;

// Decoders read and write whole groups of 64. The lengths of runs are random, so a loop over a run's
// groups would be mispredicted again and again: callers may ask for more than a run holds.
constexpr int kDecodeGroup = 64;
constexpr int kExponentCodes = 16;
constexpr int kEscapeCode = 15;

struct ExponentTable {
  uint8_t exponent[kExponentCodes];
};

namespace {

constexpr bool is_integer(Values v) { return v == Values::kInt8 || v == Values::kInt4; }

constexpr int64_t run_bytes(Values v, int64_t n) {
  switch (v) {
    case Values::kBf16x12:
      return n + (n + 1) / 2;
    case Values::kInt8:
      return n;
    case Values::kInt4:
      return (n + 1) / 2;
    default:
      return 2 * n;
  }
}

}  // namespace
}  // namespace sparse_backend::unstructured

// Reading activations before they are quantised. Plain loops that compilers vectorise; compiled
// once per instruction set, with -ffp-contract=off, so that all of them round alike.
#pragma once

#include "common.h"

namespace sparse_backend {
namespace {

// Adding 1.5 * 2^23 rounds a float of magnitude up to 2^22 to the nearest even integer, and
// leaves that integer in the low bits.
inline int32_t round_to_int(float value) {
  return static_cast<int32_t>(bits_from_float(value + 12582912.0F)) - 0x4B400000;
}

template <DType kType>
inline float read_float(const void* data, int64_t i) {
  if constexpr (kType == DType::kBf16) return float_from_bf16(static_cast<const uint16_t*>(data)[i]);
  if constexpr (kType == DType::kFp16) return float_from_fp16(static_cast<const uint16_t*>(data)[i]);
  return static_cast<const float*>(data)[i];
}

// The largest magnitude, compared as integers: order is the same, and NaN is above infinity.
template <DType kType>
inline float largest_magnitude(const void* data, int64_t count) {
  if constexpr (kType == DType::kFp32) {
    const uint32_t* bits = static_cast<const uint32_t*>(data);
    uint32_t most = 0;
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t magnitude = bits[i] & 0x7FFFFFFFU;
      most = magnitude > most ? magnitude : most;
    }
    return float_from_bits(most);
  } else {
    const uint16_t* bits = static_cast<const uint16_t*>(data);
    uint16_t most = 0;
    for (int64_t i = 0; i < count; ++i) {
      const uint16_t magnitude = bits[i] & 0x7FFFU;
      most = magnitude > most ? magnitude : most;
    }
    return read_float<kType>(&most, 0);
  }
}

}  // namespace
}  // namespace sparse_backend

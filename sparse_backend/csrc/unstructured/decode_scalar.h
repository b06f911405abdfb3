// Decoding runs of values (values.h), for any processor.
#pragma once

#include "values.h"

namespace sparse_backend::unstructured {
namespace {

struct ScalarDecoder {
  // Whether values can be read where they stand.
  template <Values kValues>
  static constexpr bool plain() {
    return kValues == Values::kBf16 || kValues == Values::kFp16;
  }

  // Writes n words. (The vector decoders write whole groups, at least `least` words.)
  template <Values kValues>
  static inline void decode(const uint8_t* run, int64_t n, int64_t, const ExponentTable& table,
                            uint16_t* words) {
    for (int64_t i = 0; i < n; ++i) {
      if constexpr (kValues == Values::kInt8) {
        words[i] = static_cast<uint16_t>(static_cast<int8_t>(run[i]));
      } else {
        const uint8_t* codes = kValues == Values::kBf16x12 ? run + n : run;
        const uint32_t code = (codes[i / 2] >> (4 * (i & 1))) & 15U;
        if constexpr (kValues == Values::kInt4) {
          words[i] = static_cast<uint16_t>(static_cast<int32_t>(code ^ 8U) - 8);
        } else {
          const uint32_t both = (static_cast<uint32_t>(table.exponent[code]) << 8) | run[i];
          words[i] = static_cast<uint16_t>((both >> 1) | (both << 15));
        }
      }
    }
  }
};

}  // namespace
}  // namespace sparse_backend::unstructured

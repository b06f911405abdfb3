// Activations for integer values: int16, one scale per token.
#pragma once

#include "../activations.h"

namespace sparse_backend::unstructured {
namespace {

template <DType kType>
float quantise_int16_typed(const void* x, int64_t k, int limit, int16_t* out) {
  const float absmax = largest_magnitude<kType>(x, k);
  if (!(absmax <= 3.4028234e38F)) {  // infinite or NaN: so is every output
    std::memset(out, 0, 2 * k);
    return float_from_bits(0x7FC00000U);
  }
  const auto most = static_cast<float>(limit);
  const float factor = most / (absmax > 1e-30F ? absmax : 1e-30F);
  for (int64_t i = 0; i < k; ++i) {
    out[i] = static_cast<int16_t>(round_to_int(read_float<kType>(x, i) * factor));
  }
  return 1.0F / factor;
}

// Writes k activations as multiples of the returned scale, at most `limit` in magnitude, and
// zeros up to `padded`. The scale is NaN if any activation is not finite.
inline float quantise_int16(const void* x, DType dtype, int64_t k, int64_t padded, int limit, int16_t* out) {
  std::memset(out + k, 0, 2 * (padded - k));
  switch (dtype) {
    case DType::kBf16:
      return quantise_int16_typed<DType::kBf16>(x, k, limit, out);
    case DType::kFp16:
      return quantise_int16_typed<DType::kFp16>(x, k, limit, out);
    default:
      return quantise_int16_typed<DType::kFp32>(x, k, limit, out);
  }
}

}  // namespace
}  // namespace sparse_backend::unstructured

// What the drivers of all unstructured formats take, and how they end: scales of the activations,
// escapes, bias, conversion. Included only by files compiled for the baseline processor.
#pragma once

#include "../prefetch.h"
#include "buffer.h"

namespace sparse_backend::unstructured {

struct LinearArgs {
  const void* x;  // [tokens, K], contiguous
  DType x_type;
  int64_t tokens;
  const void* bias;  // [N] of bias_type, or nullptr
  DType bias_type;
  void* y;  // [tokens, N], of x_type
};

// The largest magnitude of quantised activations.
inline int activation_limit(const Header& h) { return h.activation_bits == 8 ? 127 : 32767; }

constexpr int64_t kMostStored = 512;
constexpr int kEscapeTokensAhead = 8;

// Stores y for `rows` rows (at most kMostStored) from `first_row` on and `tokens` tokens from `token` on;
// result(t, out) writes what the kernel found for token t, x_scales[t] is the scale of its activations.
template <class Result>
void store_results(const View& w, const LinearArgs& args, const float* x_scales, int64_t token, int tokens,
                   int64_t first_row, int64_t rows, const Result& result) {
  const int64_t n = w.header.out_features, k = w.header.in_features;
  float value[kMostStored], bias[kMostStored];
  for (int64_t r = 0; args.bias != nullptr && r < rows; ++r) {
    bias[r] = load_as_float(args.bias, args.bias_type, first_row + r);
  }
  const uint32_t escape = w.escape_start == nullptr ? 0 : w.escape_start[first_row];
  const uint32_t last_escape = w.escape_start == nullptr ? 0 : w.escape_start[first_row + rows];
  for (int t = 0; t < tokens; ++t) {
    result(t, value);
    for (int64_t r = 0; r < rows; ++r) value[r] *= x_scales[t];
    int64_t row = first_row;
    for (uint32_t e = escape; e < last_escape; ++e) {
      while (w.escape_start[row + 1] <= e) ++row;
      // Each a cache miss of its own: those of a later token are under way meanwhile.
      prefetch(args.x,
               ((token + t + kEscapeTokensAhead) * k + w.escapes[e].column) * element_bytes(args.x_type));
      value[row - first_row] += float_from_bf16(w.escapes[e].bits) *
                                load_as_float(args.x, args.x_type, (token + t) * k + w.escapes[e].column);
    }
    for (int64_t r = 0; args.bias != nullptr && r < rows; ++r) value[r] += bias[r];
    const int64_t at = (token + t) * n + first_row;
    switch (args.x_type) {  // a loop for each type, so that they become vectors
      case DType::kBf16: {
        auto* y = static_cast<uint16_t*>(args.y) + at;
        for (int64_t r = 0; r < rows; ++r) y[r] = bf16_from_float(value[r]);
        break;
      }
      case DType::kFp16: {
        auto* y = static_cast<uint16_t*>(args.y) + at;
        for (int64_t r = 0; r < rows; ++r) y[r] = fp16_from_float(value[r]);
        break;
      }
      case DType::kFp32:
        std::memcpy(static_cast<float*>(args.y) + at, value, rows * sizeof(float));
        break;
    }
  }
}

}  // namespace sparse_backend::unstructured

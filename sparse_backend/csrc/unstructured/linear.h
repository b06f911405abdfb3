// What the drivers of all unstructured formats take, and how they end: scales of the activations,
// escapes, bias, conversion. Included only by files compiled for the baseline processor.
#pragma once

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

// Stores y for `rows` rows from `first_row` on and `tokens` tokens from `token` on; result(t, r) is
// what the kernel found, x_scales[t] the scale of token t's quantised activations.
template <class Result>
void store_results(const View& w, const LinearArgs& args, const float* x_scales, int64_t token, int tokens,
                   int64_t first_row, int64_t rows, const Result& result) {
  const int64_t n = w.header.out_features, k = w.header.in_features;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = first_row + r;
    const float bias = args.bias == nullptr ? 0.0F : load_as_float(args.bias, args.bias_type, row);
    const uint32_t escape = w.escape_start == nullptr ? 0 : w.escape_start[row];
    const uint32_t last_escape = w.escape_start == nullptr ? 0 : w.escape_start[row + 1];
    for (int t = 0; t < tokens; ++t) {
      float value = result(t, r) * x_scales[t];
      for (uint32_t e = escape; e < last_escape; ++e) {
        value += float_from_bf16(w.escapes[e].bits) *
                 load_as_float(args.x, args.x_type, (token + t) * k + w.escapes[e].column);
      }
      if (args.bias != nullptr) value += bias;
      store_float(args.y, args.x_type, (token + t) * n + row, value);
    }
  }
}

}  // namespace sparse_backend::unstructured

#include "dense.h"

#include "../parallel.h"
#include "../scratch.h"
#include "kernels.h"

namespace sparse_backend::layers {
namespace {

// Tokens whose activations stay in the second-level cache, a block of columns at a time.
constexpr int64_t kTokens = 64;
constexpr int64_t kRows = 32;

}  // namespace

void dense_linear(const DenseLinearArgs& a, const ThreadPool& pool) {
  const Kernels& k = kernels();
  const int64_t x_bytes = element_bytes(a.x_type), w_bytes = element_bytes(a.w_type);
  const int64_t x_stride = round_up(a.in_features, 16);
  thread_local Scratch x_memory;
  for (int64_t token = 0; token < a.tokens; token += kTokens) {
    const int64_t tokens = a.tokens - token < kTokens ? a.tokens - token : kTokens;
    float* x = reinterpret_cast<float*>(x_memory.reserve(tokens * x_stride * 4));
    parallel_ranges(pool, tokens, 65536 / (a.in_features + 1) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        k.widen[static_cast<int>(a.x_type)](
            static_cast<const uint8_t*>(a.x) + (token + t) * a.in_features * x_bytes, a.in_features, 1.0F,
            x + t * x_stride);
    });
    const int64_t blocks = (a.out_features + kRows - 1) / kRows;
    const bool small = a.out_features * (a.in_features + 1) * tokens < 262144;
    const int64_t range = small ? blocks : blocks / (8 * int64_t{pool.threads}) + 1;
    parallel_ranges(pool, blocks, range, [&](int64_t begin, int64_t end) {
      alignas(64) float sums[kTokens * kRows];
      for (int64_t block = begin; block < end; ++block) {
        const int64_t row = block * kRows, rows = a.out_features - row < kRows ? a.out_features - row : kRows;
        std::memset(sums, 0, sizeof(sums));
        DenseArgs d{};
        d.w = static_cast<const uint8_t*>(a.w) + row * a.w_stride * w_bytes;
        d.w_stride = a.w_stride;
        d.rows = static_cast<int>(rows);
        d.x = x;
        d.x_stride = x_stride;
        d.tokens = static_cast<int>(tokens);
        d.sums = sums;
        d.sum_stride = kRows;
        for (d.first = 0; d.first < a.in_features; d.first = d.last) {
          d.last = a.in_features - d.first < kDenseColumns ? a.in_features : d.first + kDenseColumns;
          k.dense[static_cast<int>(a.w_type)](d);
        }
        for (int64_t t = 0; t < tokens; ++t)
          for (int64_t r = 0; r < rows; ++r) {
            const float bias = a.bias == nullptr ? 0.0F : load_as_float(a.bias, a.bias_type, row + r);
            store_float(a.y, a.x_type, (token + t) * a.out_features + row + r, sums[t * kRows + r] + bias);
          }
      }
    });
  }
}

}  // namespace sparse_backend::layers

#include "bf16x12.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>

#include "../parallel.h"

namespace sparse_backend::lanes {
namespace {

using unstructured::ExponentTable;
using unstructured::kEscapeCode;

constexpr int64_t kRowsPerTask = 64;

int exponent_of(uint16_t bits) { return (bits >> 7) & 0xFF; }

}  // namespace

int64_t encode_bf16x12(const uint16_t* weight, int64_t n, int64_t k, uint8_t* low, uint8_t* high,
                       ExponentTable* exponents, std::vector<Escaped>* escapes, const ThreadPool& pool) {
  std::vector<std::atomic<int64_t>> total(256);
  parallel_ranges(pool, n, kRowsPerTask, [&](int64_t begin, int64_t end) {
    int64_t counts[4][256] = {};  // four, so that equal neighbours do not wait for each other
    for (int64_t i = begin * k; i < end * k; ++i) ++counts[i % 4][exponent_of(weight[i])];
    for (int e = 0; e < 256; ++e) total[e] += counts[0][e] + counts[1][e] + counts[2][e] + counts[3][e];
  });
  if (total[255] != 0) return total[255];

  int order[256];
  std::iota(order, order + 256, 0);
  std::stable_sort(order, order + 256, [&](int a, int b) { return total[a] > total[b]; });
  // In the order of the exponents, so that weights with the same ones have the same codes.
  std::sort(order, order + kEscapeCode);
  uint8_t code_of[256];
  std::fill(code_of, code_of + 256, static_cast<uint8_t>(kEscapeCode));
  for (int code = 0; code < kEscapeCode; ++code) {
    exponents->exponent[code] = static_cast<uint8_t>(order[code]);
    code_of[order[code]] = static_cast<uint8_t>(code);
  }
  exponents->exponent[kEscapeCode] = 0;

  const int64_t stride = (k + 1) / 2;
  std::vector<std::vector<Escaped>> found(n);
  parallel_ranges(pool, n, kRowsPerTask, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> codes(k + 1);
    for (int64_t row = begin; row < end; ++row) {
      const uint16_t* in = weight + row * k;
      uint8_t* out = low + row * k;
      codes[k] = 0;
      uint8_t any = 0;
      for (int64_t i = 0; i < k; ++i) {
        codes[i] = code_of[exponent_of(in[i])];
        out[i] = static_cast<uint8_t>(in[i] << 1 | in[i] >> 15);
        any |= codes[i] == kEscapeCode;
      }
      for (int64_t i = 0; any != 0 && i < k; ++i) {
        if (codes[i] != kEscapeCode) continue;
        out[i] = 0;
        found[row].push_back({static_cast<int32_t>(row), static_cast<int32_t>(i), in[i]});
      }
      uint8_t* halves = high + row * stride;
      for (int64_t i = 0; i < stride; ++i) {
        halves[i] = static_cast<uint8_t>(codes[2 * i] | codes[2 * i + 1] << 4);
      }
    }
  });
  for (const auto& row : found) escapes->insert(escapes->end(), row.begin(), row.end());
  return 0;
}

void decode_bf16x12(const uint8_t* low, const uint8_t* high, const ExponentTable& exponents, int64_t n,
                    int64_t k, uint16_t* weight, const ThreadPool& pool) {
  const int64_t stride = (k + 1) / 2;
  // The exponents of a byte's two codes, in their places of two words.
  std::vector<uint32_t> pairs(256);
  for (int byte = 0; byte < 256; ++byte) {
    pairs[byte] = static_cast<uint32_t>(exponents.exponent[byte & 15]) << 7 |
                  static_cast<uint32_t>(exponents.exponent[byte >> 4]) << 23;
  }
  parallel_ranges(pool, n, kRowsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const uint8_t *in = low + row * k, *halves = high + row * stride;
      uint16_t* out = weight + row * k;
      for (int64_t i = 0; i < k / 2; ++i) std::memcpy(out + 2 * i, &pairs[halves[i]], 4);
      if (k % 2 != 0) out[k - 1] = static_cast<uint16_t>(pairs[halves[k / 2]]);
      for (int64_t i = 0; i < k; ++i) {
        out[i] = static_cast<uint16_t>(out[i] | in[i] >> 1 | (in[i] & 1) << 15);
      }
    }
  });
}

}  // namespace sparse_backend::lanes

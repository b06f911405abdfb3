#include "pack.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "layout.h"

namespace sparse_backend::lanes {
namespace {

// place[row * 16 + column]: where in a run the value stands.
std::array<uint8_t, kBlockWeights> places(Values values) {
  std::array<uint8_t, kBlockWeights> out{};
  for (int i = 0; i < kBlockWeights; ++i) {
    const Place at = value_at(values, i);
    out[at.row * kBlockColumns + at.column] = static_cast<uint8_t>(i);
  }
  return out;
}

}  // namespace

int64_t write_strip(const unstructured::Canonical& weight, const int64_t* row_start,
                    const unstructured::Encoding& encoding, int64_t strip, std::vector<uint8_t>* out) {
  const int64_t blocks = (weight.in_features + kBlockColumns - 1) / kBlockColumns;
  const int64_t first = strip * kStripRows;
  const int rows = static_cast<int>(std::min<int64_t>(kStripRows, weight.out_features - first));
  const auto place = places(encoding.values);

  // 64 columns of every row at a time: four blocks.
  std::vector<uint16_t> stored;
  for (int64_t quad = 0; quad < (blocks + 3) / 4; ++quad) {
    uint64_t any = 0;
    for (int r = 0; r < rows; ++r) any |= unstructured::mask_bits(weight, first + r, quad * 64);
    for (int b = 0; b < 4; ++b) {
      if (((any >> (16 * b)) & 0xFFFFU) != 0) stored.push_back(static_cast<uint16_t>(4 * quad + b));
    }
  }
  const auto count = static_cast<int64_t>(stored.size());
  if (count == 0) return 0;
  const int64_t list = list_bytes(count);
  out->reserve(list + count * unstructured::run_bytes(encoding.values, kBlockWeights));
  out->assign(list, 0);
  const auto last = static_cast<uint16_t>(count - 1);
  std::memcpy(out->data(), &last, sizeof(last));
  std::memcpy(out->data() + sizeof(last), stored.data(), 2 * count);

  int64_t at[kStripRows] = {};
  for (int r = 0; r < rows; ++r) at[r] = row_start[first + r];
  for (const uint16_t block : stored) {
    uint16_t words[kBlockWeights] = {};
    for (int r = 0; r < rows; ++r) {
      const int64_t column = int64_t{block} * kBlockColumns;
      auto bits = static_cast<uint32_t>(unstructured::mask_bits(weight, first + r, column) & 0xFFFFU);
      for (; bits != 0; bits &= bits - 1) {
        words[place[r * kBlockColumns + __builtin_ctz(bits)]] = weight.word(at[r]++);
      }
    }
    encoding.append(words, kBlockWeights, out);
  }
  return count * kBlockWeights;
}

}  // namespace sparse_backend::lanes

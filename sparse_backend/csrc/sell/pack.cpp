#include "pack.h"

#include <algorithm>
#include <numeric>

namespace sparse_backend::sell {

int64_t write_strip(const unstructured::Canonical& weight, const int64_t* row_start,
                    const unstructured::Encoding& encoding, int64_t strip, std::vector<uint8_t>* out) {
  const int64_t first_row = strip * kStripRows;
  const int rows = static_cast<int>(std::min<int64_t>(kStripRows, weight.out_features - first_row));
  const int64_t blocks = (weight.in_features + kBlockColumns - 1) / kBlockColumns;
  int64_t at[kStripRows] = {};
  for (int r = 0; r < rows; ++r) at[r] = row_start[first_row + r];
  const int64_t nnz = row_start[first_row + rows] - row_start[first_row];
  out->reserve(blocks * 96 + nnz + unstructured::run_bytes(encoding.values, nnz) + nnz / 4);

  std::vector<uint8_t> columns(kMostEntries), active;
  std::vector<uint16_t> words(kMostEntries);
  int64_t stored = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    uint8_t column[kStripRows][kBlockColumns];
    int count[kStripRows] = {}, order[kStripRows];
    for (int r = 0; r < rows; ++r) {
      for (int half = 0; half < 2; ++half) {
        uint64_t bits = unstructured::mask_bits(weight, first_row + r, b * kBlockColumns + 64 * half);
        for (; bits != 0; bits &= bits - 1) {
          column[r][count[r]++] = static_cast<uint8_t>(64 * half + __builtin_ctzll(bits));
        }
      }
    }
    std::iota(order, order + kStripRows, 0);
    std::stable_sort(order, order + kStripRows, [&](int i, int j) { return count[i] > count[j]; });
    BlockHeader header{};
    active.clear();
    int entries = 0;
    for (int s = 0; s < kSlices; ++s) {
      const int* slice = order + s * kSliceRows;
      const int steps = (count[slice[0]] + 1) / 2;
      header.steps[s] = static_cast<uint8_t>(steps);
      for (int lane = 0; lane < kSliceRows; ++lane) {
        header.rank[slice[lane]] = static_cast<uint8_t>(s * kSliceRows + lane);
      }
      for (int step = 0; step < steps; ++step) {
        int lane = 0;
        for (; lane < kSliceRows && count[slice[lane]] > 2 * step; ++lane) {
          const int row = slice[lane];
          for (int i = 2 * step; i < 2 * step + 2; ++i, ++entries) {
            const bool exists = i < count[row];
            columns[entries] = exists ? column[row][i] : uint8_t{0};
            words[entries] = exists ? weight.word(at[row] + i) : uint16_t{0};
          }
        }
        active.push_back(static_cast<uint8_t>(lane));
      }
    }
    for (int r = 0; r < rows; ++r) at[r] += count[r];
    header.entries = static_cast<uint16_t>(entries);
    header.all_steps = static_cast<uint16_t>(active.size());
    const auto* bytes = reinterpret_cast<const uint8_t*>(&header);
    out->insert(out->end(), bytes, bytes + sizeof(header));
    active.resize(active.size() + active.size() % 2);
    out->insert(out->end(), active.begin(), active.end());
    out->insert(out->end(), columns.begin(), columns.begin() + entries);
    encoding.append(words.data(), entries, out);
    out->resize(out->size() + out->size() % 2);
    stored += entries;
  }
  return stored;
}

}  // namespace sparse_backend::sell

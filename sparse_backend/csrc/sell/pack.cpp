#include "pack.h"

#include <algorithm>
#include <functional>
#include <numeric>

namespace sparse_backend::sell {

using unstructured::Values;

namespace {

int strip_rows(const unstructured::Canonical& weight, int64_t strip) {
  return static_cast<int>(std::min<int64_t>(kStripRows, weight.out_features - strip * kStripRows));
}

int64_t block_count(const unstructured::Canonical& weight) {
  return (weight.in_features + kBlockColumns - 1) / kBlockColumns;
}

int64_t block_bytes(Values values, int64_t steps, int64_t entries) {
  const int64_t after_header = steps + steps % 2 + entries + unstructured::run_bytes(values, entries);
  return int64_t{sizeof(BlockHeader)} + after_header + after_header % 2;
}

unstructured::Part strip_size(const unstructured::Canonical& weight, const int64_t* /*row_start*/,
                              const unstructured::Encoding& encoding, int64_t strip) {
  const int rows = strip_rows(weight, strip);
  unstructured::Part part{};
  for (int64_t b = 0; b < block_count(weight); ++b) {
    int steps_of[kStripRows] = {};
    int64_t entries = 0, steps = 0;
    for (int r = 0; r < rows; ++r) {
      const int64_t row = strip * kStripRows + r, column = b * kBlockColumns;
      const int count = __builtin_popcountll(unstructured::mask_bits(weight, row, column)) +
                        __builtin_popcountll(unstructured::mask_bits(weight, row, column + 64));
      steps_of[r] = (count + 1) / 2;
      entries += 2 * steps_of[r];
    }
    std::sort(steps_of, steps_of + kStripRows, std::greater<int>());
    for (int s = 0; s < kSlices; ++s) steps += steps_of[s * kSliceRows];
    part.bytes += block_bytes(encoding.values, steps, entries);
    part.stored += entries;
  }
  return part;
}

void write_strip(const unstructured::Canonical& weight, const int64_t* row_start,
                 const unstructured::Encoding& encoding, int64_t strip, uint8_t* out) {
  const int64_t first_row = strip * kStripRows, blocks = block_count(weight);
  const int rows = strip_rows(weight, strip);
  int64_t at[kStripRows] = {};
  for (int r = 0; r < rows; ++r) at[r] = row_start[first_row + r];

  std::vector<uint8_t> columns(kMostEntries), active;
  std::vector<uint16_t> words(kMostEntries);
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
        header.rank[slice[lane]] = static_cast<uint8_t>(s * kSliceRows + slot(lane));
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
    uint8_t* to = out;
    std::memcpy(to, &header, sizeof(header));
    active.resize(active.size() + active.size() % 2);
    to = std::copy(active.begin(), active.end(), to + sizeof(header));
    to = std::copy(columns.begin(), columns.begin() + entries, to);
    encoding.write(words.data(), entries, to);
    to += unstructured::run_bytes(encoding.values, entries);
    if ((to - out) % 2 != 0) *to++ = 0;
    out = to;
  }
}

}  // namespace

const unstructured::Stream kStream{kMagic, kStripRows, 0, strip_size, write_strip};

}  // namespace sparse_backend::sell

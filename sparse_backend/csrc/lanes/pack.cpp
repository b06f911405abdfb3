#include "pack.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

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

// The stored weights of 16 columns of one row to their places in a run.
template <class Word>
void spread(const Word* data, uint32_t bits, const uint8_t* place, uint16_t* words) {
  if (bits == 0xFFFFU) {  // dense weights: nearly always
    for (int i = 0; i < kBlockColumns; ++i) words[place[i]] = static_cast<uint16_t>(data[i]);
    return;
  }
  for (; bits != 0; bits &= bits - 1) words[place[__builtin_ctz(bits)]] = static_cast<uint16_t>(*data++);
}

// The same of a weight that is coded already: its low bytes and its codes. Past N and K are zeros.
void copy_coded(const unstructured::Canonical& weight, int64_t first_row, int rows, int64_t column,
                const uint8_t* place, uint8_t* run) {
  const int64_t k = weight.in_features, stride = (k + 1) / 2;
  const int columns = static_cast<int>(std::min<int64_t>(kBlockColumns, k - column));
  uint8_t codes[kBlockWeights];
  if (rows < kStripRows || columns < kBlockColumns) {
    std::memset(run, 0, kBlockWeights);
    std::memset(codes, unstructured::kEscapeCode, kBlockWeights);
  }
  for (int r = 0; r < rows; ++r, place += kBlockColumns) {
    const uint8_t* low = static_cast<const uint8_t*>(weight.data) + (first_row + r) * k + column;
    const uint8_t* high = weight.codes + (first_row + r) * stride + column / 2;
    if (columns == kBlockColumns) {
      for (int i = 0; i < kBlockColumns; i += 2) {
        const uint8_t both = high[i / 2];
        run[place[i]] = low[i];
        run[place[i + 1]] = low[i + 1];
        codes[place[i]] = both & 15U;
        codes[place[i + 1]] = both >> 4;
      }
      continue;
    }
    for (int i = 0; i < columns; ++i) {
      run[place[i]] = low[i];
      codes[place[i]] = (high[i / 2] >> (4 * (i % 2))) & 15U;
    }
  }
  for (int i = 0; i < kBlockWeights / 2; ++i) {
    run[kBlockWeights + i] = static_cast<uint8_t>(codes[2 * i] | codes[2 * i + 1] << 4);
  }
}

int strip_rows(const unstructured::Canonical& weight, int64_t strip) {
  return static_cast<int>(std::min<int64_t>(kStripRows, weight.out_features - strip * kStripRows));
}

// The blocks of a strip that hold anything.
void find_stored(const unstructured::Canonical& weight, int64_t strip, std::vector<uint16_t>* stored) {
  const int64_t blocks = (weight.in_features + kBlockColumns - 1) / kBlockColumns;
  const int rows = strip_rows(weight, strip);
  stored->clear();
  for (int64_t quad = 0; quad < (blocks + 3) / 4; ++quad) {  // 64 columns of every row at a time
    uint64_t any = 0;
    for (int r = 0; r < rows && ~any != 0; ++r) {
      any |= unstructured::mask_bits(weight, strip * kStripRows + r, quad * 64);
    }
    for (int b = 0; b < 4; ++b) {
      if (((any >> (16 * b)) & 0xFFFFU) != 0) stored->push_back(static_cast<uint16_t>(4 * quad + b));
    }
  }
}

unstructured::Part strip_size(const unstructured::Canonical& weight, const int64_t* /*row_start*/,
                              const unstructured::Encoding& encoding, int64_t strip) {
  std::vector<uint16_t> stored;
  find_stored(weight, strip, &stored);
  const auto count = static_cast<int64_t>(stored.size());
  if (count == 0) return {0, 0};
  const int64_t bytes = list_bytes(count) + count * unstructured::run_bytes(encoding.values, kBlockWeights);
  return {bytes, count * kBlockWeights};
}

void write_strip(const unstructured::Canonical& weight, const int64_t* row_start,
                 const unstructured::Encoding& encoding, int64_t strip, uint8_t* out) {
  const int64_t first = strip * kStripRows;
  const int rows = strip_rows(weight, strip);
  const auto place = places(encoding.values);
  const bool integer = unstructured::is_integer(weight.values);
  std::vector<uint16_t> stored;
  find_stored(weight, strip, &stored);
  const auto count = static_cast<int64_t>(stored.size());
  if (count == 0) return;
  std::memset(out, 0, list_bytes(count));
  const auto last = static_cast<uint16_t>(count - 1);
  std::memcpy(out, &last, sizeof(last));
  std::memcpy(out + sizeof(last), stored.data(), 2 * count);
  out += list_bytes(count);

  int64_t at[kStripRows] = {};
  for (int r = 0; r < rows; ++r) at[r] = weight.codes == nullptr ? row_start[first + r] : 0;
  for (const uint16_t block : stored) {
    const int64_t column = int64_t{block} * kBlockColumns;
    if (weight.codes != nullptr) {
      copy_coded(weight, first, rows, column, place.data(), out);
    } else {
      uint16_t words[kBlockWeights] = {};
      for (int r = 0; r < rows; ++r) {
        const auto bits = static_cast<uint32_t>(unstructured::mask_bits(weight, first + r, column) & 0xFFFFU);
        const uint8_t* row_place = place.data() + r * kBlockColumns;
        if (integer) {
          spread(static_cast<const int8_t*>(weight.data) + at[r], bits, row_place, words);
        } else {
          spread(static_cast<const uint16_t*>(weight.data) + at[r], bits, row_place, words);
        }
        at[r] += __builtin_popcount(bits);
      }
      encoding.write(words, kBlockWeights, out);
    }
    out += unstructured::run_bytes(encoding.values, kBlockWeights);
  }
}

}  // namespace

const unstructured::Stream kStream{kMagic, kStripRows, kStripRows, strip_size, write_strip};

}  // namespace sparse_backend::lanes

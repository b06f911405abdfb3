#include "pack.h"

#include <array>
#include <atomic>
#include <cstring>

#include "../parallel.h"
#include "layout.h"

namespace sparse_backend::bitmask {
namespace {

constexpr int64_t kRowsPerTask = 64;

// For a byte of the mask: which of the next values each column takes, and whether it takes any.
struct ByteOrder {
  uint8_t source[8];
  uint8_t count;
  uint16_t keep[8];
};

std::array<ByteOrder, 256> byte_orders() {
  std::array<ByteOrder, 256> orders{};
  for (int byte = 0; byte < 256; ++byte) {
    ByteOrder& order = orders[byte];
    for (int i = 0; i < 8; ++i) {
      const bool stored = ((byte >> i) & 1) != 0;
      order.source[i] = order.count;
      order.keep[i] = stored ? 0xFFFF : 0;
      order.count = static_cast<uint8_t>(order.count + stored);
    }
    // A column without a value may not read past the eight that are known to exist.
    for (auto& source : order.source) source = source > 7 ? uint8_t{7} : source;
  }
  return orders;
}

const std::array<ByteOrder, 256> kOrders = byte_orders();

}  // namespace

int64_t pack_mask(const uint16_t* dense, DType type, int64_t rows, int64_t columns, uint8_t* mask,
                  int64_t* row_nnz, const ThreadPool& pool) {
  const uint16_t exponent = type == DType::kBf16 ? 0x7F80U : 0x7C00U;
  const int64_t stride = mask_stride(columns);
  std::atomic<int64_t> non_finite{0};
  parallel_ranges(pool, rows, kRowsPerTask, [&](int64_t begin, int64_t end) {
    int64_t bad = 0;
    for (int64_t n = begin; n < end; ++n) {
      const uint16_t* row = dense + n * columns;
      uint8_t* out = mask + n * stride;
      int64_t nnz = 0;
      for (int64_t b = 0; b < stride; ++b) {
        const int64_t first = 8 * b;
        const int count = static_cast<int>(columns - first < 8 ? columns - first : 8);
        uint32_t bits = 0, broken = 0;
        for (int i = 0; i < count; ++i) {
          const uint16_t w = row[first + i];
          bits |= static_cast<uint32_t>((w & 0x7FFFU) != 0) << i;
          broken += (w & exponent) == exponent;
        }
        out[b] = static_cast<uint8_t>(bits);
        nnz += __builtin_popcount(bits);
        bad += broken;
      }
      row_nnz[n] = nnz;
    }
    if (bad != 0) non_finite += bad;
  });
  return non_finite;
}

void pack_values(const uint16_t* dense, int64_t rows, int64_t columns, const int64_t* row_start,
                 uint16_t* values, const ThreadPool& pool) {
  parallel_ranges(pool, rows, kRowsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const uint16_t* row = dense + n * columns;
      uint16_t* out = values + row_start[n];
      const uint16_t* last = values + row_start[n + 1];
      // Written without a branch: every weight is stored, and kept only if the position
      // moves on. The guard keeps the row's trailing zeros out of the next row.
      for (int64_t k = 0; k < columns && out < last; ++k) {
        *out = row[k];
        out += (row[k] & 0x7FFFU) != 0;
      }
    }
  });
}

void unpack(const Canonical& weight, const int64_t* row_start, uint16_t* dense, const ThreadPool& pool) {
  const int64_t columns = weight.in_features, stride = mask_stride(columns);
  const auto* stored_values = static_cast<const uint16_t*>(weight.data);
  const uint16_t* end_of_values = stored_values + weight.nnz;
  parallel_ranges(pool, weight.out_features, kRowsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const uint8_t* mask = weight.mask + n * stride;
      const uint16_t* values = stored_values + row_start[n];
      uint16_t* row = dense + n * columns;
      int64_t k = 0;
      for (; k + 8 <= columns; k += 8) {
        const ByteOrder& order = kOrders[mask[k / 8]];
        // Reading past a row's values is reading the next row's; the last rows are done below.
        if (values + 8 > end_of_values) break;
        for (int i = 0; i < 8; ++i)
          row[k + i] = static_cast<uint16_t>(values[order.source[i]] & order.keep[i]);
        values += order.count;
      }
      for (; k < columns; ++k) {
        const bool stored = (mask[k / 8] >> (k % 8)) & 1U;
        row[k] = stored ? *values : uint16_t{0};
        values += stored;
      }
    }
  });
}

namespace {

// Rows of a panel that exist.
int panel_rows(const Canonical& weight, int64_t panel) {
  const int64_t rest = weight.out_features - panel * kPanelRows;
  return static_cast<int>(rest < kPanelRows ? rest : kPanelRows);
}

unstructured::Part panel_size(const Canonical& weight, const int64_t* row_start, const Encoding& encoding,
                              int64_t panel) {
  const int rows = panel_rows(weight, panel);
  const int64_t chunks = (weight.in_features + kChunk - 1) / kChunk, first = panel * kPanelRows;
  const int64_t stored = row_start[first + rows] - row_start[first];
  int64_t bytes = chunks * kPanelRows * 8;
  if (encoding.values != unstructured::Values::kBf16x12 && encoding.values != unstructured::Values::kInt4) {
    return {bytes + unstructured::run_bytes(encoding.values, stored), stored};
  }
  for (int64_t c = 0; c < chunks; ++c) {  // a run with an odd count rounds up
    int64_t count = 0;
    for (int r = 0; r < rows; ++r) {
      count += __builtin_popcountll(unstructured::mask_bits(weight, first + r, c * kChunk));
    }
    bytes += unstructured::run_bytes(encoding.values, count);
  }
  return {bytes, stored};
}

void write_panel(const Canonical& weight, const int64_t* row_start, const Encoding& encoding, int64_t panel,
                 uint8_t* out) {
  const int rows = panel_rows(weight, panel);
  const int64_t chunks = (weight.in_features + kChunk - 1) / kChunk, first = panel * kPanelRows;
  int64_t at[kPanelRows] = {};
  for (int r = 0; r < rows; ++r) at[r] = row_start[first + r];
  uint16_t words[kPanelRows * kChunk];
  for (int64_t c = 0; c < chunks; ++c) {
    uint64_t masks[kPanelRows] = {};
    int64_t count = 0;
    for (int r = 0; r < rows; ++r) {
      masks[r] = unstructured::mask_bits(weight, first + r, c * kChunk);
      const int stored = __builtin_popcountll(masks[r]);
      weight.words(at[r], stored, words + count);
      count += stored;
      at[r] += stored;
    }
    std::memcpy(out, masks, sizeof(masks));
    encoding.write(words, count, out + sizeof(masks));
    out += sizeof(masks) + unstructured::run_bytes(encoding.values, count);
  }
}

}  // namespace

const unstructured::Stream kStream{kMagic, kPanelRows, 0, panel_size, write_panel};

int64_t count_nonzero(const uint16_t* values, int64_t count, const ThreadPool& pool) {
  constexpr int64_t kBlock = 16384;  // fits a 16-bit counter, which vectors count in
  std::atomic<int64_t> total{0};
  parallel_ranges(pool, (count + kBlock - 1) / kBlock, 16, [&](int64_t begin, int64_t end) {
    int64_t sum = 0;
    for (int64_t b = begin; b < end; ++b) {
      const int64_t last = (b + 1) * kBlock < count ? (b + 1) * kBlock : count;
      uint16_t here = 0;
      for (int64_t i = b * kBlock; i < last; ++i) here += static_cast<uint16_t>((values[i] & 0x7FFF) != 0);
      sum += here;
    }
    total.fetch_add(sum, std::memory_order_relaxed);
  });
  return total;
}

}  // namespace sparse_backend::bitmask

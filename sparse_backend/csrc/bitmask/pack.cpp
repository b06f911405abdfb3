#include "pack.h"

#include <atomic>
#include <cstring>

#include "../parallel.h"
#include "layout.h"

namespace sparse_backend::bitmask {
namespace {

constexpr int64_t kRowsPerTask = 64;

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

bool row_starts(const uint8_t* mask, int64_t rows, int64_t columns, int64_t* row_start,
                const ThreadPool& pool) {
  const int64_t stride = mask_stride(columns);
  std::atomic<bool> clean{true};
  row_start[0] = 0;
  parallel_ranges(pool, rows, kRowsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const uint8_t* row = mask + n * stride;
      int64_t nnz = 0, b = 0;
      for (; b + 8 <= stride; b += 8) {
        uint64_t word;
        std::memcpy(&word, row + b, sizeof(word));
        nnz += __builtin_popcountll(word);
      }
      for (; b < stride; ++b) nnz += __builtin_popcount(row[b]);
      if (columns % 8 != 0 && (row[stride - 1] >> (columns % 8)) != 0) clean = false;
      row_start[n + 1] = nnz;
    }
  });
  for (int64_t n = 0; n < rows; ++n) row_start[n + 1] += row_start[n];
  return clean;
}

void unpack(const Canonical& weight, const int64_t* row_start, uint16_t* dense, const ThreadPool& pool) {
  const int64_t columns = weight.in_features, stride = mask_stride(columns);
  parallel_ranges(pool, weight.out_features, kRowsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const uint8_t* mask = weight.mask + n * stride;
      const uint16_t* values = weight.values + row_start[n];
      uint16_t* row = dense + n * columns;
      for (int64_t k = 0; k < columns; ++k) {
        const bool stored = (mask[k / 8] >> (k % 8)) & 1U;
        row[k] = stored ? *values : uint16_t{0};
        values += stored;
      }
    }
  });
}

int64_t machine_bytes(int64_t out_features, int64_t in_features, int64_t nnz) {
  const int64_t panels = (out_features + kPanelRows - 1) / kPanelRows;
  const int64_t chunks = (in_features + kChunk - 1) / kChunk;
  const int64_t offsets = round_up((panels + 1) * 8, 64);
  return int64_t{sizeof(Header)} + offsets + panels * chunks * kPanelRows * 8 + 2 * nnz + kTailPadding;
}

void lower(const Canonical& weight, const int64_t* row_start, uint8_t* buffer, const ThreadPool& pool) {
  const int64_t rows = weight.out_features, columns = weight.in_features;
  const int64_t panels = (rows + kPanelRows - 1) / kPanelRows;
  const int64_t chunks = (columns + kChunk - 1) / kChunk;
  const int64_t stride = mask_stride(columns);
  const int64_t stream_offset = int64_t{sizeof(Header)} + round_up((panels + 1) * 8, 64);
  const int64_t total = machine_bytes(rows, columns, weight.nnz);

  const Header header{
      kMagic, static_cast<int32_t>(weight.value_type), 0, rows, columns, weight.nnz, panels, stream_offset,
      total};
  std::memset(buffer, 0, stream_offset);
  std::memcpy(buffer, &header, sizeof(header));
  uint64_t* offsets = reinterpret_cast<uint64_t*>(buffer + sizeof(header));
  for (int64_t p = 0; p <= panels; ++p) {
    const int64_t first_row = p * kPanelRows < rows ? p * kPanelRows : rows;
    offsets[p] = static_cast<uint64_t>(p * chunks * kPanelRows * 8 + 2 * row_start[first_row]);
  }
  std::memset(buffer + total - kTailPadding, 0, kTailPadding);

  parallel_ranges(pool, panels, kRowsPerTask / kPanelRows, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      uint8_t* out = buffer + stream_offset + offsets[p];
      const uint16_t* values[kPanelRows] = {};
      for (int r = 0; r < kPanelRows; ++r) {
        const int64_t n = p * kPanelRows + r;
        if (n < rows) values[r] = weight.values + row_start[n];
      }
      for (int64_t c = 0; c < chunks; ++c) {
        uint64_t masks[kPanelRows] = {};
        const int64_t first = c * kChunk / 8;
        const int64_t bytes = stride - first < 8 ? stride - first : 8;
        for (int r = 0; r < kPanelRows; ++r) {
          const int64_t n = p * kPanelRows + r;
          if (n < rows) std::memcpy(&masks[r], weight.mask + n * stride + first, bytes);
        }
        std::memcpy(out, masks, sizeof(masks));
        out += sizeof(masks);
        for (int r = 0; r < kPanelRows; ++r) {
          const int64_t count = __builtin_popcountll(masks[r]);
          if (count == 0) continue;
          std::memcpy(out, values[r], 2 * count);
          values[r] += count;
          out += 2 * count;
        }
      }
    }
  });
}

const char* parse(const uint8_t* buffer, int64_t bytes, View* view) {
  if (bytes < int64_t{sizeof(Header)}) return "packed weight is shorter than its header";
  std::memcpy(&view->header, buffer, sizeof(Header));
  const Header& h = view->header;
  if (h.magic != kMagic) return "packed weight does not start with a bitmask header";
  if (h.value_type != static_cast<int32_t>(DType::kBf16) &&
      h.value_type != static_cast<int32_t>(DType::kFp16)) {
    return "packed weight has an unknown value type";
  }
  // Bounds first: the sums below must not overflow on a header that is garbage.
  constexpr int64_t kMaxFeatures = int64_t{1} << 31;
  if (h.out_features > kMaxFeatures || h.in_features > kMaxFeatures || h.nnz > bytes) {
    return "packed weight's header does not agree with its size";
  }
  if (h.out_features < 0 || h.in_features < 0 || h.nnz < 0 || h.total_bytes != bytes ||
      h.panels != (h.out_features + kPanelRows - 1) / kPanelRows ||
      h.stream_offset != int64_t{sizeof(Header)} + round_up((h.panels + 1) * 8, 64) ||
      bytes != machine_bytes(h.out_features, h.in_features, h.nnz)) {
    return "packed weight's header does not agree with its size";
  }
  view->offsets = reinterpret_cast<const uint64_t*>(buffer + sizeof(Header));
  const uint64_t stream_bytes = static_cast<uint64_t>(bytes - h.stream_offset - kTailPadding);
  bool ordered = view->offsets[0] == 0 && view->offsets[h.panels] == stream_bytes;
  for (int64_t p = 0; p < h.panels; ++p) ordered &= view->offsets[p] <= view->offsets[p + 1];
  if (!ordered) return "packed weight's panel offsets are damaged";
  view->stream = buffer + h.stream_offset;
  view->chunks = (h.in_features + kChunk - 1) / kChunk;
  return nullptr;
}

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

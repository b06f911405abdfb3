#include "pack.h"

#include <array>
#include <atomic>
#include <cstring>

#include "../cpu_features.h"
#include "../parallel.h"
#include "order.h"

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

// Rows of a strip that exist.
int strip_rows(const Canonical& weight, int64_t strip) {
  const int64_t rest = weight.out_features - strip * kStripRows;
  return static_cast<int>(rest < kStripRows ? rest : kStripRows);
}

// How many weights each mask of four columns stores, of a chunk's 16 rows.
void quad_counts(const uint64_t rows[kStripRows], uint8_t counts[kChunk / 4]) {
  constexpr uint64_t kPairs = 0x5555555555555555, kQuads = 0x3333333333333333, kBytes = 0x0F0F0F0F0F0F0F0F;
  uint64_t even = 0, odd = 0;  // a count in each byte, of 64 at most
  for (int r = 0; r < kStripRows; ++r) {
    const uint64_t pairs = rows[r] - ((rows[r] >> 1) & kPairs);
    const uint64_t quads = (pairs & kQuads) + ((pairs >> 2) & kQuads);
    even += quads & kBytes;
    odd += (quads >> 4) & kBytes;
  }
  for (int q = 0; q < kChunk / 4; q += 2) {
    counts[q] = static_cast<uint8_t>(even >> (4 * q));
    counts[q + 1] = static_cast<uint8_t>(odd >> (4 * q));
  }
}

unstructured::Part strip_size(const Canonical& weight, const int64_t* row_start, const Encoding& encoding,
                              int64_t strip) {
  const int rows = strip_rows(weight, strip);
  const int64_t chunks = (weight.in_features + kChunk - 1) / kChunk, first = strip * kStripRows;
  const int64_t stored = row_start[first + rows] - row_start[first];
  int64_t bytes = chunks * kMaskBytes;
  if (encoding.values != unstructured::Values::kBf16x12 && encoding.values != unstructured::Values::kInt4) {
    return {bytes + unstructured::run_bytes(encoding.values, stored), stored};
  }
  for (int64_t c = 0; c < chunks; ++c) {  // a run with an odd count rounds up
    uint64_t masks[kStripRows] = {};
    uint8_t counts[kChunk / 4];
    for (int r = 0; r < rows; ++r) masks[r] = unstructured::mask_bits(weight, first + r, c * kChunk);
    quad_counts(masks, counts);
    for (const uint8_t count : counts) bytes += unstructured::run_bytes(encoding.values, count);
  }
  return {bytes, stored};
}

template <Values kValues, class Value>
int order(const ChunkRows<Value>& rows, uint8_t* masks, Value* out) {
  constexpr int kColumns = mask_columns(kValues), kBits = kStripRows * kColumns;
  const Value* values[kStripRows];
  std::memcpy(values, rows.values, sizeof(values));
  int count = 0;
  for (int i = 0; i < kChunk / kColumns; ++i) {
    uint64_t mask = 0;
    for (int bit = 0; bit < kBits; ++bit) {
      const Place at = place_of(kValues, bit);
      const uint64_t stored = (rows.mask[at.row] >> (i * kColumns + at.column)) & 1U;
      mask |= stored << bit;
      // Without a branch: every weight is written, and kept only if the place moves on.
      out[count] = *(values[at.row] < rows.last ? values[at.row] : rows.last);
      count += static_cast<int>(stored);
      values[at.row] += stored;
    }
    std::memcpy(masks + i * (kBits / 8), &mask, kBits / 8);
  }
  return count;
}

const OrderKernels& order_kernels() {
  static constexpr OrderKernels kernels{order<Values::kBf16, uint16_t>, order<Values::kBf16x12, uint16_t>,
                                        order<Values::kInt8, int8_t>};
#if defined(SPARSE_BACKEND_EMULATE_AVX512)
  if (active_isa() != Isa::kScalar) return avx512_order_kernels();
#elif defined(__x86_64__)
  if (active_isa() >= Isa::kAvx512) return avx512_order_kernels();
#endif
  return kernels;
}

// The chunks of a strip, one after the other: finish(rows, c) with the rows of chunk c.
template <class Value, class Finish>
void each_chunk(const Canonical& weight, const int64_t* row_start, int64_t strip, const Finish& finish) {
  const int rows = strip_rows(weight, strip);
  const int64_t chunks = (weight.in_features + kChunk - 1) / kChunk, first = strip * kStripRows;
  const auto* data = static_cast<const Value*>(weight.data);
  const Value none{};
  ChunkRows<Value> chunk{};
  chunk.last = weight.nnz > 0 ? data + weight.nnz - 1 : &none;
  for (int r = 0; r < kStripRows; ++r) {
    chunk.values[r] = r < rows && weight.nnz > 0 ? data + row_start[first + r] : chunk.last;
  }
  for (int64_t c = 0; c < chunks; ++c) {
    for (int r = 0; r < rows; ++r) chunk.mask[r] = unstructured::mask_bits(weight, first + r, c * kChunk);
    finish(chunk);
    for (int r = 0; r < rows; ++r) chunk.values[r] += __builtin_popcountll(chunk.mask[r]);
  }
}

void write_strip(const Canonical& weight, const int64_t* row_start, const Encoding& encoding, int64_t strip,
                 uint8_t* out) {
  const OrderKernels& kernels = order_kernels();
  uint16_t words[kChunkWeights + 32];
  // The masks stand at `out`, their weights in `words`.
  const auto put_coded = [&] {
    const uint16_t* next = words;
    uint8_t* run = out + kMaskBytes;
    for (int i = 0; i < kMaskBytes; i += 8) {
      uint64_t mask;
      std::memcpy(&mask, out + i, sizeof(mask));
      const int count = __builtin_popcountll(mask);
      encoding.write(next, count, run);
      run += unstructured::run_bytes(encoding.values, count);
      next += count;
    }
    out = run;
  };
  if (!unstructured::is_integer(weight.values)) {
    each_chunk<uint16_t>(weight, row_start, strip, [&](const auto& rows) {
      if (encoding.values == Values::kBf16x12) {
        kernels.coded(rows, out, words);
        return put_coded();
      }
      const int count = kernels.words(rows, out, words);
      std::memcpy(out + kMaskBytes, words, 2 * count);
      out += kMaskBytes + 2 * count;
    });
    return;
  }
  int8_t codes[kChunkWeights + 64];
  each_chunk<int8_t>(weight, row_start, strip, [&](const auto& rows) {
    const int count = kernels.bytes(rows, out, codes);
    if (encoding.values == Values::kInt8) {
      std::memcpy(out + kMaskBytes, codes, count);
      out += kMaskBytes + count;
      return;
    }
    for (int i = 0; i < count; ++i) words[i] = static_cast<uint16_t>(codes[i]);
    put_coded();
  });
}

}  // namespace

const unstructured::Stream kStream{kMagic, kStripRows, kStripRows, strip_size, write_strip};

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

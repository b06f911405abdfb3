#include "pack.h"

#include <atomic>

#include "../parallel.h"

namespace sparse_backend::lowbit {
namespace {

int64_t rows_at_once(int64_t k) { return 65536 / (k + 1) + 1; }

// Magnitudes are compared as bit patterns. kInfinity's pattern is the first that is not finite.
template <class Bits, Bits kInfinity>
bool scan_group(const Bits* weight, int64_t count, int8_t* codes, Bits* scale) {
  constexpr Bits kSign = static_cast<Bits>(Bits{1} << (8 * sizeof(Bits) - 1));
  Bits most = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Bits magnitude = weight[i] & static_cast<Bits>(~kSign);
    most = magnitude > most ? magnitude : most;
  }
  *scale = most;
  if (most >= kInfinity) return false;
  unsigned other = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Bits magnitude = weight[i] & static_cast<Bits>(~kSign);
    other |= static_cast<unsigned>((magnitude != 0) & (magnitude != most));
    codes[i] = static_cast<int8_t>(magnitude == 0 ? 0 : (weight[i] & kSign) != 0 ? -1 : 1);
  }
  return other == 0;
}

template <class Bits, Bits kInfinity>
bool scan_rows(const Bits* weight, int64_t n, int64_t k, int64_t group, int8_t* codes, Bits* scales,
               const ThreadPool& pool) {
  const int64_t groups = (k + group - 1) / group;
  std::atomic<bool> ternary{true};
  parallel_ranges(pool, n, rows_at_once(k), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end && ternary.load(std::memory_order_relaxed); ++row) {
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t at = row * k + g * group;
        const int64_t count = k - g * group < group ? k - g * group : group;
        if (!scan_group<Bits, kInfinity>(weight + at, count, codes + at, scales + row * groups + g)) {
          ternary.store(false, std::memory_order_relaxed);
          return;
        }
      }
    }
  });
  return ternary;
}

uint8_t encode_byte(const int8_t* codes, int64_t count, int per_byte) {
  int value = 0, unit = 1;
  for (int i = 0; i < per_byte; ++i) {
    value += (i < count ? codes[i] + 1 : 0) * unit;
    unit *= per_byte == 4 ? 4 : 3;
  }
  return static_cast<uint8_t>(value);
}

}  // namespace

bool scan_ternary(const void* weight, DType type, int64_t n, int64_t k, int64_t group, int8_t* codes,
                  void* scales, const ThreadPool& pool) {
  if (group <= 0 || group > k) group = k > 0 ? k : 1;
  if (type == DType::kFp32) {
    return scan_rows<uint32_t, 0x7F800000U>(static_cast<const uint32_t*>(weight), n, k, group, codes,
                                            static_cast<uint32_t*>(scales), pool);
  }
  const auto* bits = static_cast<const uint16_t*>(weight);
  auto* out = static_cast<uint16_t*>(scales);
  if (type == DType::kBf16) return scan_rows<uint16_t, 0x7F80>(bits, n, k, group, codes, out, pool);
  return scan_rows<uint16_t, 0x7C00>(bits, n, k, group, codes, out, pool);
}

int64_t encode(const int8_t* codes, int64_t n, int64_t k, int per_byte, uint8_t* out,
               const ThreadPool& pool) {
  const int64_t stride = canonical_stride(k, per_byte);
  std::atomic<int64_t> bad{0};
  parallel_ranges(pool, n, rows_at_once(k), [&](int64_t begin, int64_t end) {
    int64_t wrong = 0;
    for (int64_t i = begin * k; i < end * k; ++i) wrong += codes[i] < -1 || codes[i] > 1;
    bad.fetch_add(wrong, std::memory_order_relaxed);
    if (wrong != 0) return;
    for (int64_t row = begin; row < end; ++row) {
      const int8_t* in = codes + row * k;
      for (int64_t b = 0; b < stride; ++b) {
        out[row * stride + b] = encode_byte(in + b * per_byte, k - b * per_byte, per_byte);
      }
    }
  });
  return bad;
}

int64_t decode(const uint8_t* packed, int64_t n, int64_t k, int per_byte, int8_t* codes,
               const ThreadPool& pool) {
  const int64_t stride = canonical_stride(k, per_byte);
  // The codes of every byte value, and whether all of them exist.
  int8_t table[256][5];
  bool valid[256];
  for (int byte = 0; byte < 256; ++byte) {
    valid[byte] = per_byte == 4 || byte < 243;
    int value = byte;
    for (int i = 0; i < per_byte; ++i) {
      const int base = per_byte == 4 ? 4 : 3;
      const int code = value % base;
      valid[byte] = valid[byte] && code < 3;
      table[byte][i] = static_cast<int8_t>(code - 1);
      value /= base;
    }
  }
  std::atomic<int64_t> bad{0};
  parallel_ranges(pool, n, rows_at_once(k), [&](int64_t begin, int64_t end) {
    int64_t wrong = 0;
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t b = 0; b < stride; ++b) {
        const uint8_t byte = packed[row * stride + b];
        const int64_t left = k - b * per_byte;
        bool good = valid[byte];
        for (int i = 0; i < per_byte; ++i) {
          if (i < left) {
            codes[row * k + b * per_byte + i] = table[byte][i];
          } else {
            good = good && table[byte][i] == -1;  // padding is code 0
          }
        }
        wrong += !good;
      }
    }
    bad.fetch_add(wrong, std::memory_order_relaxed);
  });
  return bad;
}

namespace {

// One panel's rows, [kPanelRows][columns] of codes, written as lines.
void write_panel(const Plan& plan, const uint8_t* codes, int64_t columns, uint8_t* out) {
  const int block_lines = plan.span / 4;
  static constexpr int kUnits[5] = {1, 3, 9, 27, 81};
  const auto code = [&](int row, int64_t column) { return codes[row * columns + column]; };
  for (int64_t i = 0; i < plan.lines5; ++i, out += kLine) {
    const int64_t at = i / block_lines * 5 * plan.span + i % block_lines * 4;
    for (int byte = 0; byte < kLine; ++byte) {
      int value = 0;
      for (int slot = 0; slot < 5; ++slot)
        value += kUnits[slot] * code(byte / 4, at + slot * plan.span + byte % 4);
      out[byte] = static_cast<uint8_t>(value);
    }
  }
  const auto two_bits = [&](int row, int64_t column, int step) {
    return static_cast<uint8_t>(code(row, column) | code(row, column + step) << 2 |
                                code(row, column + 2 * step) << 4 | code(row, column + 3 * step) << 6);
  };
  int64_t at = plan.lines5 * 20;
  for (int64_t i = 0; i < plan.lines2; ++i, out += kLine, at += 16) {
    for (int byte = 0; byte < kLine; ++byte) out[byte] = two_bits(byte / 4, at + byte % 4, 4);
  }
  for (int row = 0; row < kPanelRows; ++row) {
    for (int byte = 0; byte < plan.tail_bytes; ++byte) *out++ = two_bits(row, at + 4 * byte, 1);
  }
  for (int64_t i = 0; i < plan.lines8; ++i, out += kLine) {
    for (int byte = 0; byte < kLine; ++byte) out[byte] = code(byte / 4, 4 * i + byte % 4);
  }
}

}  // namespace

int64_t lower(const int8_t* weights, const Header& header, uint8_t* out, const ThreadPool& pool) {
  const Plan plan = make_plan(header.storage, header.in_features, header.group_size);
  const int64_t n = header.out_features, k = header.in_features;
  const bool int8 = header.storage == Storage::kInt8;
  const int limit = int8 ? 127 : 1, offset = int8 ? 128 : 1;
  std::memset(out, 0, kHeaderBytes);
  std::memcpy(out, &header, sizeof(header));
  const int64_t panels = panel_count(n), columns = plan.padded + 64;
  std::atomic<int64_t> bad{0};
  parallel_ranges(pool, panels, 1, [&](int64_t begin, int64_t end) {
    // Past the last row and column weights are 0 (code `offset`), past whole bytes code 0.
    uint8_t* codes = new uint8_t[kPanelRows * columns];
    int64_t wrong = 0;
    for (int64_t p = begin; p < end; ++p) {
      std::memset(codes, 0, kPanelRows * columns);
      for (int row = 0; row < kPanelRows; ++row) {
        uint8_t* to = codes + row * columns;
        if (p * kPanelRows + row >= n) {
          std::memset(to, offset, k);
          continue;
        }
        const int8_t* from = weights + (p * kPanelRows + row) * k;
        for (int64_t i = 0; i < k; ++i) {
          wrong += from[i] > limit || from[i] < -limit;
          to[i] = static_cast<uint8_t>(from[i] + offset);
        }
      }
      if (wrong == 0) write_panel(plan, codes, columns, out + kHeaderBytes + p * plan.panel_bytes);
    }
    delete[] codes;
    bad.fetch_add(wrong, std::memory_order_relaxed);
  });
  return bad;
}

const char* parse(const uint8_t* data, int64_t bytes, Header* header) {
  if (bytes < kHeaderBytes) return "packed weight is too small to hold a header";
  std::memcpy(header, data, sizeof(*header));
  const Header& h = *header;
  if (h.magic != kMagic) return "packed weight is not a machine form of low-bit weights";
  const bool storage =
      h.storage == Storage::kInt8 || h.storage == Storage::kTwoBits || h.storage == Storage::kFiveTrits;
  const bool group = h.group_size == 0 || (h.group_size >= kGroupSpan && h.group_size <= 256 &&
                                           (h.group_size & (h.group_size - 1)) == 0);
  if (!storage || !group || h.limbs < 1 || h.limbs > 3) return "packed weight has a damaged header";
  if ((h.storage == Storage::kInt8) != (h.limbs == 2) || (h.storage == Storage::kInt8 && h.group_size != 0)) {
    return "packed weight has a damaged header";
  }
  if (h.out_features < 0 || h.in_features < 0 || h.in_features > kMaxColumns ||
      h.out_features > (int64_t{1} << 40)) {
    return "packed weight has a damaged header";
  }
  const Plan plan = make_plan(h.storage, h.in_features, h.group_size);
  if (machine_bytes(plan, h.out_features) != bytes)
    return "packed weight is truncated or has a damaged header";
  return nullptr;
}

}  // namespace sparse_backend::lowbit

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

// Codes -1, 0, 1 of one canonical byte; what is past the last column counts as code 0.
uint8_t encode_byte(const int8_t* codes, int64_t count, int per_byte) {
  int value = 0, unit = 1;
  for (int i = 0; i < per_byte; ++i) {
    value += (i < count ? codes[i] + 1 : 0) * unit;
    unit *= per_byte == 4 ? 4 : 3;
  }
  return static_cast<uint8_t>(value);
}

// The same for a whole byte of four, as one 32-bit number: codes are at most 2, so the shifts
// bring them together without carries.
uint8_t encode_four(const int8_t* codes) {
  uint32_t four;
  std::memcpy(&four, codes, sizeof(four));
  four = ((four & 0x7F7F7F7FU) + 0x01010101U) ^ (four & 0x80808080U);  // + 1 in every byte, no carries
  return static_cast<uint8_t>(four | four >> 6 | four >> 12 | four >> 18);
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
      const int64_t whole = k / per_byte;
      for (int64_t b = 0; b < whole; ++b) {
        out[row * stride + b] = per_byte == 4 ? encode_four(in + 4 * b) : encode_byte(in + 5 * b, 5, 5);
      }
      if (whole < stride) {
        out[row * stride + whole] = encode_byte(in + whole * per_byte, k - whole * per_byte, per_byte);
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
      const uint8_t* in = packed + row * stride;
      int8_t* out = codes + row * k;
      const int64_t whole = k / per_byte;
      for (int64_t b = 0; b < whole; ++b, out += per_byte) {
        wrong += !valid[in[b]];
        std::memcpy(out, table[in[b]], 4);
        if (per_byte == 5) out[4] = table[in[b]][4];
      }
      if (whole < stride) {
        const uint8_t byte = in[whole];
        bool good = valid[byte];
        for (int i = 0; i < per_byte; ++i) {
          if (i < k - whole * per_byte) {
            out[i] = table[byte][i];
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

uint32_t four_codes(const uint8_t* codes) {
  uint32_t four;
  std::memcpy(&four, codes, sizeof(four));
  return four;
}

// One row of codes into its dwords of a panel's lines. Four columns are one 32-bit number, and
// shifts and products of all four stay within their bytes: 2 * (1 + 3 + 9 + 27 + 81) < 256.
void write_row(const Plan& plan, const uint8_t* codes, int row, uint8_t* panel) {
  const int block_lines = plan.span / 4;
  uint8_t* out = panel + 4 * row;
  const auto put = [&](uint32_t dword) {
    std::memcpy(out, &dword, sizeof(dword));
    out += kLine;
  };
  for (int64_t i = 0; i < plan.lines5; ++i) {
    const uint8_t* c = codes + i / block_lines * 5 * plan.span + i % block_lines * 4;
    const int span = plan.span;
    put(four_codes(c) + 3 * four_codes(c + span) + 9 * four_codes(c + 2 * span) +
        27 * four_codes(c + 3 * span) + 81 * four_codes(c + 4 * span));
  }
  codes += plan.lines5 * 20;
  for (int64_t i = 0; i < plan.lines2; ++i, codes += 16) {
    put(four_codes(codes) | four_codes(codes + 4) << 2 | four_codes(codes + 8) << 4 |
        four_codes(codes + 12) << 6);
  }
  uint8_t* tail = panel + (plan.lines5 + plan.lines2) * kLine + row * plan.tail_bytes;
  for (int b = 0; b < plan.tail_bytes; ++b, codes += 4) {
    *tail++ = static_cast<uint8_t>(codes[0] | codes[1] << 2 | codes[2] << 4 | codes[3] << 6);
  }
  for (int64_t i = 0; i < plan.lines8; ++i, codes += 4) put(four_codes(codes));
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
    // Past the last row weights are 0 (code `offset`), past the last column code 0.
    uint8_t* codes = new uint8_t[columns];
    int64_t wrong = 0;
    for (int64_t p = begin; p < end; ++p) {
      for (int row = 0; row < kPanelRows; ++row) {
        std::memset(codes + k, 0, columns - k);
        if (p * kPanelRows + row >= n) {
          std::memset(codes, offset, k);
        } else {
          const int8_t* from = weights + (p * kPanelRows + row) * k;
          int bad_here = 0;
          for (int64_t i = 0; i < k; ++i) {
            bad_here |= from[i] > limit || from[i] < -limit;
            codes[i] = static_cast<uint8_t>(from[i] + offset);
          }
          wrong += bad_here;
          if (bad_here != 0) continue;
        }
        write_row(plan, codes, row, out + kHeaderBytes + p * plan.panel_bytes);
      }
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

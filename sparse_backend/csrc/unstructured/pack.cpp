#include "pack.h"

#include <algorithm>
#include <atomic>
#include <numeric>

#include "../parallel.h"

namespace sparse_backend::unstructured {
namespace {

constexpr int64_t kRowsPerTask = 64;

int exponent_of(uint16_t bf16) { return (bf16 >> 7) & 0xFF; }

// The exponents' frequencies decide the codes; the rest become escapes.
void code_exponents(const Canonical& weight, const int64_t* row_start, Encoding* encoding,
                    const ThreadPool& pool) {
  std::vector<std::atomic<int64_t>> total(256);
  parallel_ranges(pool, weight.out_features, kRowsPerTask, [&](int64_t begin, int64_t end) {
    int64_t counts[256] = {};
    for (int64_t i = row_start[begin]; i < row_start[end]; ++i) ++counts[exponent_of(weight.word(i))];
    for (int e = 0; e < 256; ++e) total[e] += counts[e];
  });
  int order[256];
  std::iota(order, order + 256, 0);
  std::stable_sort(order, order + 256, [&](int a, int b) { return total[a] > total[b]; });
  std::fill(encoding->code_of, encoding->code_of + 256, static_cast<uint8_t>(kEscapeCode));
  int64_t coded = 0;
  for (int code = 0; code < kEscapeCode; ++code) {
    encoding->exponents.exponent[code] = static_cast<uint8_t>(order[code]);
    encoding->code_of[order[code]] = static_cast<uint8_t>(code);
    coded += total[order[code]];
  }
  encoding->exponents.exponent[kEscapeCode] = 0;
  const int64_t escapes = weight.nnz - coded;
  if (escapes * 1000 > weight.nnz || escapes >= int64_t{1} << 32) return;
  encoding->values = Values::kBf16x12;
  if (escapes == 0) return;

  encoding->escape_start.assign(weight.out_features + 1, 0);
  for (int64_t n = 0; n < weight.out_features; ++n) {
    int64_t i = row_start[n];
    for (int64_t first = 0; first < weight.in_features; first += 64) {
      uint64_t bits = mask_bits(weight, n, first);
      // Rare, so most words of the mask are only counted.
      const int64_t next = i + __builtin_popcountll(bits);
      bool any = false;
      for (int64_t j = i; j < next; ++j) any |= encoding->code_of[exponent_of(weight.word(j))] == kEscapeCode;
      for (; any && bits != 0; bits &= bits - 1, ++i) {
        const uint16_t word = weight.word(i);
        if (encoding->code_of[exponent_of(word)] != kEscapeCode) continue;
        encoding->escapes.push_back({static_cast<uint32_t>(first + __builtin_ctzll(bits)), word, 0});
      }
      i = next;
    }
    encoding->escape_start[n + 1] = static_cast<uint32_t>(encoding->escapes.size());
  }
}

}  // namespace

uint64_t mask_bits(const Canonical& weight, int64_t row, int64_t first) {
  const int64_t stride = mask_stride(weight.in_features);
  const int64_t bytes = std::min<int64_t>(8, stride - first / 8);
  uint64_t bits = 0;
  if (bytes > 0) std::memcpy(&bits, weight.mask + row * stride + first / 8, bytes);
  return bits;
}

void Encoding::append(const uint16_t* words, int64_t n, std::vector<uint8_t>* out) const {
  const size_t at = out->size();
  out->resize(at + run_bytes(values, n));
  uint8_t* run = out->data() + at;
  switch (values) {
    case Values::kBf16:
    case Values::kFp16:
      if (n > 0) std::memcpy(run, words, 2 * n);
      return;
    case Values::kInt8:
      for (int64_t i = 0; i < n; ++i) run[i] = static_cast<uint8_t>(words[i]);
      return;
    case Values::kInt4:
      for (int64_t i = 0; i < n; i += 2) {
        run[i / 2] = static_cast<uint8_t>((words[i] & 15U) | (i + 1 < n ? (words[i + 1] & 15U) << 4 : 0U));
      }
      return;
    case Values::kBf16x12:
      for (int64_t i = 0; i < n; ++i) {
        const uint8_t code = code_of[exponent_of(words[i])];
        const bool escape = code == kEscapeCode;
        const auto low = static_cast<uint8_t>((words[i] & 0x7FU) << 1 | words[i] >> 15);
        run[i] = escape ? uint8_t{0} : low;
        uint8_t& both = run[n + i / 2];
        both = static_cast<uint8_t>((i & 1) != 0 ? both | code << 4 : code);
      }
      return;
  }
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

Built build(const Canonical& weight, const int64_t* row_start, const Settings& settings, uint64_t magic,
            int64_t rows_per_part, WritePart write_part, const ThreadPool& pool) {
  Built built{};
  built.encoding.values = weight.values;
  if (settings.coded && weight.values == Values::kBf16) {
    code_exponents(weight, row_start, &built.encoding, pool);
  }
  built.scale_tile = settings.scale_tile > 0 ? settings.scale_tile : weight.out_features;
  const int64_t parts = (weight.out_features + rows_per_part - 1) / rows_per_part;
  built.parts.resize(parts);
  std::atomic<int64_t> stored{0};
  parallel_ranges(pool, parts, kRowsPerTask / rows_per_part + 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      stored += write_part(weight, row_start, built.encoding, p, &built.parts[p]);
    }
  });
  Header& h = built.header;
  h.magic = magic;
  h.values = built.encoding.values;
  h.group_size = settings.group_size;
  h.activation_bits = settings.activation_bits;
  h.out_features = weight.out_features;
  h.in_features = weight.in_features;
  h.stored = stored;
  h.parts = parts;
  h.escapes = static_cast<int64_t>(built.encoding.escapes.size());
  h.exponents = built.encoding.exponents;
  int64_t stream_bytes = 0;
  for (const auto& part : built.parts) stream_bytes += static_cast<int64_t>(part.size());
  lay_out(&h, stream_bytes);
  return built;
}

void write(const Built& built, const float* scales, uint8_t* buffer, const ThreadPool& pool) {
  const Header& h = built.header;
  std::memset(buffer, 0, h.stream_offset);
  std::memset(buffer + h.total_bytes - kTailPadding, 0, kTailPadding);
  std::memcpy(buffer, &h, sizeof(h));
  auto* offsets = reinterpret_cast<uint64_t*>(buffer + sizeof(h));
  for (int64_t p = 0; p < h.parts; ++p) offsets[p + 1] = offsets[p] + built.parts[p].size();
  // Transposed: the kernels scale many rows by one group at a time.
  auto* transposed = reinterpret_cast<float*>(buffer + h.scales_offset);
  const int64_t groups = scale_groups(h), tile = built.scale_tile;
  for (int64_t n = 0; n < h.out_features; ++n) {
    float* out = transposed + n / tile * tile * groups + n % tile;
    for (int64_t g = 0; g < groups; ++g) out[g * tile] = scales[n * groups + g];
  }
  if (h.escapes > 0) {
    uint8_t* section = buffer + h.escapes_offset;
    const auto& e = built.encoding;
    std::memcpy(section, e.escape_start.data(), e.escape_start.size() * 4);
    std::memcpy(section + round_up((h.out_features + 1) * 4, 8), e.escapes.data(),
                e.escapes.size() * sizeof(Escape));
  }
  parallel_ranges(pool, h.parts, 4, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const auto& part = built.parts[p];
      if (!part.empty()) std::memcpy(buffer + h.stream_offset + offsets[p], part.data(), part.size());
    }
  });
}

}  // namespace sparse_backend::unstructured

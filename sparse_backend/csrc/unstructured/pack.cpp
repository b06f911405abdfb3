#include "pack.h"

#include <algorithm>
#include <atomic>
#include <numeric>
#include <utility>

#include "../parallel.h"

namespace sparse_backend::unstructured {
namespace {

constexpr int64_t kRowsPerTask = 64;
constexpr int64_t kSampledTasks = 8;

int exponent_of(uint16_t bf16) { return (bf16 >> 7) & 0xFF; }

// The values of row n whose exponents have no code.
void find_escapes(const Canonical& weight, const uint16_t* words, const int64_t* row_start,
                  const Encoding& encoding, int64_t n, std::vector<Escape>* found) {
  int64_t i = row_start[n];
  for (int64_t first = 0; first < weight.in_features; first += 64) {
    uint64_t bits = mask_bits(weight, n, first);
    // Rare, so most words of the mask are only counted.
    const int64_t next = i + __builtin_popcountll(bits);
    uint8_t codes[64];
    const bool any = encoding.find_codes(words + i, next - i, codes);
    for (; any && bits != 0; bits &= bits - 1, ++i) {
      if (encoding.code_of[exponent_of(words[i])] != kEscapeCode) continue;
      found->push_back({static_cast<uint32_t>(first + __builtin_ctzll(bits)), words[i], 0});
    }
    i = next;
  }
}

// Gives codes to the 15 most frequent exponents of the rows that are looked at, every `step`-th task of
// them, and lists the values without one. False if these are more than 1 in 1000.
bool code_exponents(const Canonical& weight, const int64_t* row_start, int64_t step, Encoding* encoding,
                    const ThreadPool& pool) {
  const auto* words = static_cast<const uint16_t*>(weight.data);
  const int64_t rows = weight.out_features, tasks = (rows + kRowsPerTask - 1) / kRowsPerTask;
  std::vector<std::atomic<int64_t>> total(256);
  parallel_ranges(pool, (tasks + step - 1) / step, 1, [&](int64_t first, int64_t last) {
    int64_t counts[4][256] = {};  // four, so that equal neighbours do not wait for each other
    for (int64_t task = first; task < last; ++task) {
      const int64_t begin = task * step * kRowsPerTask, end = std::min(rows, begin + kRowsPerTask);
      for (int64_t i = row_start[begin]; i < row_start[end]; ++i) ++counts[i % 4][exponent_of(words[i])];
    }
    for (int e = 0; e < 256; ++e) total[e] += counts[0][e] + counts[1][e] + counts[2][e] + counts[3][e];
  });
  int order[256];
  std::iota(order, order + 256, 0);
  std::stable_sort(order, order + 256, [&](int a, int b) { return total[a] > total[b]; });
  std::sort(order, order + kEscapeCode);  // nearly always neighbours: a code is then a difference
  encoding->first_exponent = order[kEscapeCode - 1] - order[0] == kEscapeCode - 1 ? order[0] : -1;
  std::fill(encoding->code_of, encoding->code_of + 256, static_cast<uint8_t>(kEscapeCode));
  for (int code = 0; code < kEscapeCode; ++code) {
    encoding->exponents.exponent[code] = static_cast<uint8_t>(order[code]);
    encoding->code_of[order[code]] = static_cast<uint8_t>(code);
  }
  encoding->exponents.exponent[kEscapeCode] = 0;

  std::vector<std::vector<Escape>> found(rows);
  std::atomic<int64_t> room{std::min(weight.nnz / 1000, (int64_t{1} << 32) - 1)};
  parallel_ranges(pool, rows, kRowsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end && room >= 0; ++n) {
      find_escapes(weight, words, row_start, *encoding, n, &found[n]);
      room -= static_cast<int64_t>(found[n].size());
    }
  });
  if (room < 0) return false;
  encoding->values = Values::kBf16x12;
  encoding->escape_start.assign(rows + 1, 0);
  for (int64_t n = 0; n < rows; ++n) {
    encoding->escapes.insert(encoding->escapes.end(), found[n].begin(), found[n].end());
    encoding->escape_start[n + 1] = static_cast<uint32_t>(encoding->escapes.size());
  }
  return true;
}

// n low bytes, then the codes in halves of bytes. Escapes are rare: they are looked for once per piece.
void write_coded(const Encoding& encoding, const uint16_t* words, int64_t n, uint8_t* run) {
  constexpr int64_t kPiece = 256;
  for (int64_t first = 0; first < n; first += kPiece) {
    const int64_t count = n - first < kPiece ? n - first : kPiece;
    const uint16_t* in = words + first;
    uint8_t *low = run + first, *high = run + n + first / 2;
    uint8_t codes[kPiece + 1];
    const bool any = encoding.find_codes(in, count, codes);
    codes[count] = 0;
    for (int64_t i = 0; i < count; ++i) low[i] = static_cast<uint8_t>(in[i] << 1 | in[i] >> 15);
    for (int64_t i = 0; any && i < count; ++i) low[i] = codes[i] == kEscapeCode ? uint8_t{0} : low[i];
    for (int64_t i = 0; i < (count + 1) / 2; ++i) {
      high[i] = static_cast<uint8_t>(codes[2 * i] | codes[2 * i + 1] << 4);
    }
  }
}

}  // namespace

bool Encoding::find_codes(const uint16_t* words, int64_t n, uint8_t* codes) const {
  uint8_t largest = 0;
  if (first_exponent >= 0) {
    const auto first = static_cast<uint8_t>(first_exponent);
    for (int64_t i = 0; i < n; ++i) {
      const auto code = static_cast<uint8_t>(static_cast<uint8_t>(words[i] >> 7) - first);
      codes[i] = code < kEscapeCode ? code : uint8_t{kEscapeCode};
    }
  } else {
    for (int64_t i = 0; i < n; ++i) codes[i] = code_of[exponent_of(words[i])];
  }
  for (int64_t i = 0; i < n; ++i) largest = codes[i] > largest ? codes[i] : largest;
  return largest == kEscapeCode;
}

void Encoding::write(const uint16_t* words, int64_t n, uint8_t* run) const {
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
      write_coded(*this, words, n, run);
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

Built build(const Canonical& weight, const int64_t* row_start, const Settings& settings, const Stream& stream,
            Encoding encoding, const ThreadPool& pool) {
  Built built{{}, stream, std::move(encoding), {}};
  built.encoding.values = weight.values;
  if (settings.coded && weight.values == Values::kBf16) {
    const auto code = [&](int64_t step) {
      return code_exponents(weight, row_start, step, &built.encoding, pool);
    };
    // A few rows nearly always tell what all of them have.
    if (!code(kSampledTasks)) code(1);
  }
  const int64_t parts = (weight.out_features + stream.rows_per_part - 1) / stream.rows_per_part;
  built.offsets.assign(parts + 1, 0);
  std::atomic<int64_t> stored{0};
  const int64_t parts_per_task = kRowsPerTask / stream.rows_per_part + 1;
  parallel_ranges(pool, parts, parts_per_task, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const Part part = stream.size(weight, row_start, built.encoding, p);
      built.offsets[p + 1] = static_cast<uint64_t>(part.bytes);
      stored += part.stored;
    }
  });
  for (int64_t p = 0; p < parts; ++p) built.offsets[p + 1] += built.offsets[p];
  Header& h = built.header;
  h.magic = stream.magic;
  h.values = built.encoding.values;
  h.group_size = settings.group_size;
  h.activation_bits = settings.activation_bits;
  h.out_features = weight.out_features;
  h.in_features = weight.in_features;
  h.stored = stored;
  h.parts = parts;
  h.escapes = static_cast<int64_t>(built.encoding.escapes.size());
  h.exponents = built.encoding.exponents;
  lay_out(&h, static_cast<int64_t>(built.offsets[parts]));
  return built;
}

void write(const Built& built, const Canonical& weight, const int64_t* row_start, const float* scales,
           uint8_t* buffer, const ThreadPool& pool) {
  const Header& h = built.header;
  const Stream& stream = built.stream;
  std::memset(buffer, 0, h.stream_offset);
  std::memset(buffer + h.total_bytes - kTailPadding, 0, kTailPadding);
  std::memcpy(buffer, &h, sizeof(h));
  std::memcpy(buffer + sizeof(h), built.offsets.data(), built.offsets.size() * 8);
  // Transposed: the kernels scale many rows by one group at a time.
  auto* transposed = reinterpret_cast<float*>(buffer + h.scales_offset);
  const int64_t groups = scale_groups(h), tile = stream.scale_tile > 0 ? stream.scale_tile : h.out_features;
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
  parallel_ranges(pool, h.parts, kRowsPerTask / stream.rows_per_part + 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      stream.write(weight, row_start, built.encoding, p, buffer + h.stream_offset + built.offsets[p]);
    }
  });
}

}  // namespace sparse_backend::unstructured

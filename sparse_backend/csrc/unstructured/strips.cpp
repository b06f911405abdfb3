#include "strips.h"

#include "../cpu_features.h"
#include "../parallel.h"
#include "../scratch.h"
#include "linear.h"

namespace sparse_backend::unstructured {
namespace {

constexpr int kSumColumns = 16;

// Units of one token after the other, into their place among `together` tokens.
template <class Unit>
void interleave(const uint8_t* row, int64_t bytes, int64_t token, int64_t together, uint8_t* tile) {
  const auto* in = reinterpret_cast<const Unit*>(row);
  auto* out = reinterpret_cast<Unit*>(tile) + token;
  for (int64_t i = 0; i < bytes / int64_t{sizeof(Unit)}; ++i) out[i * together] = in[i];
}

void interleave(const StripKernels& kernels, const uint8_t* row, int64_t bytes, int64_t token,
                int64_t together, uint8_t* tile) {
  struct TwoWords {
    uint64_t word[2];
  };
  struct Line {
    uint64_t word[8];
  };
  struct TwoLines {
    Line line[2];
  };
  switch (kernels.x_unit_bytes) {
    case 4:
      return interleave<uint32_t>(row, bytes, token, together, tile);
    case 8:
      return interleave<uint64_t>(row, bytes, token, together, tile);
    case 16:
      return interleave<TwoWords>(row, bytes, token, together, tile);
    case 64:
      return interleave<Line>(row, bytes, token, together, tile);
    default:
      return interleave<TwoLines>(row, bytes, token, together, tile);
  }
}

// Tiles of equal height: 8 tokens are 4 and 4, not 6 and 2. Where few tokens would be left for a padded tile,
// lower ones: 64 tokens in tiles of at most 12 are 8 times 8, not 5 times 12 and 4.
int tile_height(const BatchKernel& kernel, int tokens) {
  const auto equal = [&](int most) {
    const int tiles = (tokens + most - 1) / most;
    return static_cast<int>(round_up((tokens + tiles - 1) / tiles, kernel.step));
  };
  const auto padded = [&](int height) { return round_up(tokens, height); };
  const int high = equal(kernel.tile), low = equal(kernel.tile - kernel.step);
  return 3 * low >= 2 * kernel.tile && padded(low) < padded(high) ? low : high;
}

// Tokens of a call: as every call decodes all weights, none is left with only a few.
int64_t call_tokens(const BatchKernel& kernel, int64_t tokens) {
  const int64_t calls = (tokens + kernel.tokens - 1) / kernel.tokens;
  const int64_t share = round_up((tokens + calls - 1) / (calls > 0 ? calls : 1), kernel.tile);
  return share < kernel.tokens ? share : kernel.tokens;
}

// Strips of a call: more than usual where the kernel likes that, and threads still have enough calls each.
int64_t unit_strips(const BatchKernel& kernel, int64_t strips, int tokens, const ThreadPool& pool) {
  if (tokens <= kernel.tile) return kUnitStrips;
  const int64_t share = strips / (8 * int64_t{pool.threads}) / kUnitStrips * kUnitStrips;
  return share < kUnitStrips ? kUnitStrips : share < kernel.strips ? share : kernel.strips;
}

// The activations of one call's tokens.
struct Prepared {
  uint8_t* x;
  float* scales;
  int32_t* sums;
  int64_t row_bytes;
  int64_t sum_stride;
  int height;  // tokens of a tile
};

Prepared prepare(const StripKernels& kernels, const BatchKernel& kernel, const View& w,
                 const LinearArgs& args, int64_t token, int tokens, const ThreadPool& pool) {
  const int64_t k = w.header.in_features, x_row_bytes = k * element_bytes(args.x_type);
  const int64_t padded = round_up(k, kernels.column_step);
  const int step = kernel.step;
  Prepared p{};
  p.height = tile_height(kernel, tokens);
  p.row_bytes = padded * kernels.x_element_bytes;
  p.sum_stride = padded / kSumColumns;
  const int64_t places = round_up(tokens, step);
  const int64_t sum_bytes = kernels.wants_sums ? tokens * p.sum_stride * int64_t{sizeof(int32_t)} : 0;
  thread_local Scratch memory;
  p.x = memory.reserve(places * p.row_bytes + places * int64_t{sizeof(float)} + sum_bytes);
  p.scales = reinterpret_cast<float*>(p.x + places * p.row_bytes);
  p.sums = reinterpret_cast<int32_t*>(p.scales + places);
  const uint8_t* x = static_cast<const uint8_t*>(args.x) + token * x_row_bytes;
  const int limit = activation_limit(w.header);
  constexpr int64_t kPrepareElements = 32768;  // waking the pool costs microseconds
  // Tile by tile: the tokens of one share cache lines.
  const int64_t count = (tokens + p.height - 1) / p.height;
  parallel_ranges(pool, count, kPrepareElements / (p.height * (k + 1)) + 1, [&](int64_t begin, int64_t end) {
    thread_local Scratch row_memory;
    uint8_t* row = row_memory.reserve(2 * p.row_bytes);  // kernels of bytes make words of them first
    for (int64_t first = begin * p.height; first < end * p.height && first < tokens; first += p.height) {
      const int64_t here = tokens - first < p.height ? tokens - first : p.height;
      const int64_t together = round_up(here, step);
      uint8_t* tile = p.x + first * p.row_bytes;
      for (int64_t t = first; t < first + here; ++t) {
        const bool direct = together == 1 && kernels.x_element_bytes > 1;
        uint8_t* converted = direct ? tile : row;
        p.scales[t] = kernels.prepare(x + t * x_row_bytes, args.x_type, k, limit, converted);
        for (int64_t b = 0; kernels.wants_sums && b < p.sum_stride; ++b) {
          const auto* block = reinterpret_cast<const int16_t*>(converted) + b * kSumColumns;
          int32_t sum = 0;
          for (int i = 0; i < kSumColumns; ++i) sum += block[i];
          p.sums[t * p.sum_stride + b] = sum;
        }
        if (!direct) interleave(kernels, row, p.row_bytes, t - first, together, tile);
      }
      if (together > here) std::memset(row, 0, p.row_bytes);
      for (int64_t t = here; t < together; ++t) {
        interleave(kernels, row, p.row_bytes, t, together, tile);
      }
    }
  });
  return p;
}

}  // namespace

void strips_linear(const StripKernels& kernels, const View& w, const LinearArgs& args,
                   const ThreadPool& pool) {
  const Header& h = w.header;
  const int64_t k = h.in_features, n = h.out_features, groups = scale_groups(h);
  // Tile after tile with gemv: from the second on a unit's weights come from the L2 cache.
  const bool one_stream = reads_one_stream();
  const bool batched = args.tokens > int64_t{kernels.gemv_tokens} * kernels.gemv_tiles;
  const BatchKernel tiles{kernels.gemv, kernels.gemv_tokens * kernels.gemv_tiles, kernels.gemv_tokens, 1};
  const BatchKernel& kernel = batched ? kernels.gemm : tiles;
  const int64_t step_tokens = call_tokens(kernel, args.tokens);
  for (int64_t token = 0; token < args.tokens; token += step_tokens) {
    const int64_t left = args.tokens - token;
    const int tokens = static_cast<int>(left < step_tokens ? left : step_tokens);
    const Prepared prepared = prepare(kernels, kernel, w, args, token, tokens, pool);
    // Small matrices stay on this thread; large ones are cut into at least eight pieces per thread, as some
    // cores may be half as fast as others.
    constexpr int64_t kMultiplyAdds = 262144;
    const int64_t strips = h.parts * kernels.part_strips,
                  together = unit_strips(kernel, strips, tokens, pool);
    const int64_t units = (strips + together - 1) / together;
    int64_t range = kMultiplyAdds / (together * kStripRows * (k + 1) * tokens) + 1;
    const int64_t even_share = units / (8 * int64_t{pool.threads}) + 1;
    if (units > range && range < even_share) range = even_share;
    parallel_ranges(pool, units, range, [&](int64_t begin, int64_t end) {
      thread_local Scratch memory;
      const int64_t result_bytes = together * kStripRows * tokens * 4;
      uint8_t* scratch = memory.reserve(result_bytes + kernels.scratch_bytes);
      StripArgs unit{};
      unit.columns = k;
      unit.one_stream = one_stream;
      unit.exponents = &h.exponents;
      unit.group_columns = h.group_size;
      unit.x_row_bytes = prepared.row_bytes;
      unit.tile_tokens = prepared.height;
      const bool by_group = kernels.part_strips > 1;
      unit.strip_scales = by_group ? kStripRows : groups * kStripRows;
      unit.group_scales = by_group ? n : kStripRows;
      unit.x_sum_stride = prepared.sum_stride;
      unit.out = reinterpret_cast<float*>(scratch);
      unit.scratch = scratch + result_bytes;
      for (int64_t u = begin; u < end; ++u) {
        const int64_t first = u * together, row = first * kStripRows;
        unit.strips = static_cast<int>(strips - first < together ? strips - first : together);
        unit.scales = w.scales + first * unit.strip_scales;
        for (int s = 0; s < unit.strips; ++s) {
          const int64_t part = (first + s) / kernels.part_strips;
          const uint64_t offset = w.offsets[part];
          unit.strip[s] = offset == w.offsets[part + 1] ? nullptr : w.stream + offset;
        }
        const int64_t rows = unit.strips * int64_t{kStripRows};
        const int step = batched ? tokens : prepared.height;
        for (int t = 0; t < tokens; t += step) {
          unit.x = prepared.x + t * prepared.row_bytes;
          unit.x_sums = prepared.sums + t * prepared.sum_stride;
          unit.tokens = tokens - t < step ? tokens - t : step;
          kernel.run(unit);
          store_results(w, args, prepared.scales + t, token + t, unit.tokens, row,
                        n - row < rows ? n - row : rows, [&](int i, float* out) {
                          for (int s = 0; s < unit.strips; ++s) {
                            std::memcpy(out + s * kStripRows, unit.out + (s * unit.tokens + i) * kStripRows,
                                        kStripRows * sizeof(float));
                          }
                        });
        }
      }
    });
  }
}

}  // namespace sparse_backend::unstructured

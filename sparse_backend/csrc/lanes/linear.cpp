#include "linear.h"

#include "../cpu_features.h"
#include "../parallel.h"
#include "../scratch.h"

namespace sparse_backend::lanes {
namespace {

const Kernels& select(Values values, DType x_type) {
#if defined(__x86_64__)
  switch (active_isa()) {
    case Isa::kAvx512: {
      const bool bf16 = values == Values::kBf16 || values == Values::kBf16x12;
      if (cpu_features().avx512_bf16 && bf16 && x_type == DType::kBf16) return avx512_bf16_kernels(values);
      return avx512_kernels(values);
    }
    case Isa::kAvx2:
      return avx2_kernels(values);
    case Isa::kScalar:
      break;
  }
#endif
  (void)x_type;
  return scalar_kernels(values);
}

// Four bytes of one token after the other, into its place among `together` tokens.
void interleave(const uint8_t* row, int64_t count, int64_t token, int64_t together, uint8_t* tile) {
  const auto* in = reinterpret_cast<const uint32_t*>(row);
  auto* out = reinterpret_cast<uint32_t*>(tile) + token;
  for (int64_t i = 0; i < count; ++i) out[i * together] = in[i];
}

}  // namespace

const char* kernel_name(Values values, DType x_type) { return select(values, x_type).name; }

void linear(const unstructured::View& w, const unstructured::LinearArgs& args, const ThreadPool& pool) {
  linear_with(select(w.header.values, args.x_type), w, args, pool);
}

void linear_with(const Kernels& kernels, const unstructured::View& w, const unstructured::LinearArgs& args,
                 const ThreadPool& pool) {
  const unstructured::Header& h = w.header;
  const int64_t k = h.in_features, n = h.out_features;
  const int64_t x_row_bytes = k * element_bytes(args.x_type);
  const int64_t blocks = (k + kBlockColumns - 1) / kBlockColumns;
  const int64_t row_bytes = blocks * kBlockColumns * kernels.x_element_bytes;
  const bool batched = args.tokens > kernels.gemv_tokens;
  const int64_t most = batched ? kGemmTokens : kernels.gemv_tokens;
  const int limit = unstructured::activation_limit(h);

  thread_local Scratch prepared_memory;
  for (int64_t token = 0; token < args.tokens; token += most) {
    const int tokens = static_cast<int>(args.tokens - token < most ? args.tokens - token : most);
    const int64_t sum_bytes = kernels.wants_sums ? tokens * blocks * int64_t{sizeof(int32_t)} : 0;
    uint8_t* prepared =
        prepared_memory.reserve(tokens * row_bytes + most * int64_t{sizeof(float)} + sum_bytes);
    float* x_scales = reinterpret_cast<float*>(prepared + tokens * row_bytes);
    // Tiles of equal height: 8 tokens are 4 and 4, not 6 and 2.
    const int tiles = batched ? (tokens + kernels.gemm_tile - 1) / kernels.gemm_tile : 1;
    const int height = (tokens + tiles - 1) / tiles;
    int32_t* x_sums = reinterpret_cast<int32_t*>(x_scales + most);
    const uint8_t* x = static_cast<const uint8_t*>(args.x) + token * x_row_bytes;
    // Waking the pool costs microseconds: work of about that size stays on this thread.
    constexpr int64_t kPrepareElements = 32768;
    constexpr int64_t kMultiplyAdds = 262144;
    // Tile by tile: the tokens of one share cache lines.
    parallel_ranges(pool, tiles, kPrepareElements / (height * (k + 1)) + 1, [&](int64_t begin, int64_t end) {
      thread_local Scratch row_memory;
      uint8_t* row = row_memory.reserve(row_bytes);
      for (int64_t t = begin * height; t < end * height && t < tokens; ++t) {
        const int64_t first = t / height * height;
        const int64_t together = tokens - first < height ? tokens - first : height;
        uint8_t* tile = prepared + first * row_bytes;
        uint8_t* converted = together == 1 ? tile : row;
        x_scales[t] = kernels.prepare(x + t * x_row_bytes, args.x_type, k, limit, converted);
        for (int64_t b = 0; kernels.wants_sums && b < blocks; ++b) {
          const auto* block = reinterpret_cast<const int16_t*>(converted) + b * kBlockColumns;
          int32_t sum = 0;
          for (int i = 0; i < kBlockColumns; ++i) sum += block[i];
          x_sums[t * blocks + b] = sum;
        }
        if (together > 1) interleave(row, row_bytes / 4, t - first, together, tile);
      }
    });

    const int64_t units = (h.parts + kUnitStrips - 1) / kUnitStrips;
    int64_t range = kMultiplyAdds / (kUnitStrips * kStripRows * (k + 1) * tokens) + 1;
    const int64_t even_share = units / (8 * int64_t{pool.threads}) + 1;
    if (units > range && range < even_share) range = even_share;
    parallel_ranges(pool, units, range, [&](int64_t begin, int64_t end) {
      thread_local Scratch memory;
      constexpr int64_t kResultBytes = int64_t{kUnitStrips} * kStripRows * kGemmTokens * 4;
      const int64_t groups = unstructured::scale_groups(h);
      uint8_t* scratch = memory.reserve(kResultBytes + kScratchBytes);
      UnitArgs unit{};
      unit.exponents = &h.exponents;
      unit.group_columns = h.group_size;
      unit.x = prepared;
      unit.x_row_bytes = row_bytes;
      unit.tile_tokens = height;
      unit.strip_scales = groups * kStripRows;
      unit.x_sums = x_sums;
      unit.x_sum_stride = blocks;
      unit.tokens = tokens;
      unit.out = reinterpret_cast<float*>(scratch);
      unit.scratch = scratch + kResultBytes;
      for (int64_t u = begin; u < end; ++u) {
        const int64_t first = u * kUnitStrips, row = first * kStripRows;
        unit.strips = static_cast<int>(h.parts - first < kUnitStrips ? h.parts - first : kUnitStrips);
        unit.scales = w.scales + row * groups;
        for (int s = 0; s < unit.strips; ++s) {
          const uint64_t offset = w.offsets[first + s];
          unit.strip[s] = offset == w.offsets[first + s + 1] ? nullptr : w.stream + offset;
        }
        (batched ? kernels.gemm : kernels.gemv)(unit);
        const int64_t rows = unit.strips * int64_t{kStripRows};
        unstructured::store_results(
            w, args, x_scales, token, tokens, row, n - row < rows ? n - row : rows, [&](int t, int64_t r) {
              return unit.out[(r / kStripRows * tokens + t) * kStripRows + r % kStripRows];
            });
      }
    });
  }
}

}  // namespace sparse_backend::lanes

#include "linear.h"

#include "../cpu_features.h"
#include "../parallel.h"
#include "../scratch.h"
#include "kernels.h"

namespace sparse_backend::lowbit {
namespace {

const Kernels& select() {
#if defined(__x86_64__)
  switch (active_isa()) {
    case Isa::kAmx:
      return amx_kernels();
    case Isa::kAvx512:
      if (cpu_features().avx512_vnni) return avx512_vnni_kernels();
      [[fallthrough]];
    case Isa::kAvx2:
      return cpu_features().avx_vnni ? avx_vnni_kernels() : avx2_kernels();
    case Isa::kScalar:
      break;
  }
#endif
  return scalar_kernels();
}

// Sums of one unit stay in the L2 cache: with column groups there are many per output.
constexpr int64_t kSumBytes = 262144;

int tokens_at_once(const Kernels& kernels, const Plan& plan, int limbs) {
  const int64_t rows = kSumBytes / (plan.segments * kUnitRows * static_cast<int64_t>(sizeof(int32_t)));
  const int64_t gemm_rows = kernels.tiles ? kTileGemmRows : kGemmRows;
  const int64_t most = rows < gemm_rows ? rows : gemm_rows;
  return most < 8 * limbs ? 8 : static_cast<int>(most / limbs);
}

}  // namespace

void arrange_tiles(const int8_t* x, int64_t stride, int rows, int64_t begin, int64_t end, int8_t* out) {
  const int height = tile_height(rows);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t first = row / height * height;
    const int64_t here = rows - first < height ? rows - first : height;
    int8_t* to = out + first * stride + (row - first) * kTileColumns;
    for (int64_t c = 0; c < stride; c += kTileColumns, to += here * kTileColumns) {
      std::memcpy(to, x + row * stride + c, kTileColumns);
    }
  }
}

const char* kernel_name() { return select().name; }

void linear(const LinearArgs& a, const ThreadPool& pool) {
  const Kernels& kernels = select();
  const int64_t k = a.header.in_features, n = a.header.out_features;
  const int limbs = a.header.limbs;
  const Plan plan = make_plan(a.header.storage, k, a.header.group_size);
  const int64_t panels = panel_count(n), units = (panels + kUnitPanels - 1) / kUnitPanels;
  const int64_t x_row_bytes = k * (a.x_type == DType::kFp32 ? 4 : 2);
  const int64_t y_row_bytes = n * (a.x_type == DType::kFp32 ? 4 : 2);
  const int64_t block = tokens_at_once(kernels, plan, limbs);

  thread_local Scratch x_memory, sum_memory, scale_memory;
  for (int64_t token = 0; token < a.tokens; token += block) {
    const int64_t tokens = a.tokens - token < block ? a.tokens - token : block;
    const int rows = static_cast<int>(tokens) * limbs;
    const bool tiles = kernels.tiles && rows > kernels.gemv_rows;
    const int64_t x_bytes = rows * plan.padded + kLine;
    int8_t* x = reinterpret_cast<int8_t*>(x_memory.reserve(tiles ? 2 * x_bytes : x_bytes));
    int8_t* x_tiles = tiles ? x + x_bytes : nullptr;
    int32_t* x_sums = reinterpret_cast<int32_t*>(sum_memory.reserve(rows * plan.segments * 4));
    float* x_scales = reinterpret_cast<float*>(scale_memory.reserve(tokens * 4));
    // Waking the pool costs microseconds: work of about that size stays on this thread.
    constexpr int64_t kPrepareElements = 32768;
    constexpr int64_t kMultiplyAdds = 524288;
    parallel_ranges(pool, tokens, kPrepareElements / (k + 1) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        PrepareArgs p{};
        p.plan = &plan;
        p.x = static_cast<const uint8_t*>(a.x) + (token + t) * x_row_bytes;
        p.type = a.x_type;
        p.limbs = limbs;
        p.absmax = a.absmax == nullptr ? nullptr : a.absmax + token + t;
        p.out = x + t * limbs * plan.padded;
        p.sums = x_sums + t * limbs * plan.segments;
        p.scale = x_scales + t;
        kernels.prepare(p);
      }
      if (tiles) arrange_tiles(x, plan.padded, rows, begin * limbs, end * limbs, x_tiles);
    });

    const bool small = units * kUnitRows * (k + 1) * rows < kMultiplyAdds;
    const int64_t range = small ? units : units / (8 * int64_t{pool.threads}) + 1;
    parallel_ranges(pool, units, range, [&](int64_t begin, int64_t end) {
      thread_local Scratch memory;
      const int64_t sum_bytes = plan.segments * rows * kUnitRows * static_cast<int64_t>(sizeof(int32_t));
      uint8_t* scratch = memory.reserve(kScratchBytes + sum_bytes);
      UnitArgs unit{};
      unit.plan = &plan;
      unit.x = x;
      unit.x_stride = plan.padded;
      unit.x_tiles = x_tiles;
      unit.rows = rows;
      unit.one_stream = reads_one_stream();
      unit.scratch = scratch;
      unit.out = reinterpret_cast<int32_t*>(scratch + kScratchBytes);
      FinishArgs finish{};
      finish.plan = &plan;
      finish.sums_out = unit.out;
      finish.rows = rows;
      finish.limbs = limbs;
      finish.segments_per_group = plan.segment > 0 ? static_cast<int>(a.header.group_size / plan.segment) : 1;
      finish.x_sums = x_sums;
      finish.x_scales = x_scales;
      finish.scales = a.scales;
      finish.scale_type = a.scale_type;
      finish.scale_stride = a.one_scale ? 0 : n;
      finish.bias = a.bias;
      finish.bias_type = a.bias_type;
      finish.y = static_cast<uint8_t*>(a.y) + token * y_row_bytes;
      finish.type = a.x_type;
      finish.out_features = n;
      for (int64_t u = begin; u < end; ++u) {
        const int64_t left = panels - u * kUnitPanels;
        unit.panels = static_cast<int>(left < kUnitPanels ? left : kUnitPanels);
        for (int p = 0; p < unit.panels; ++p)
          unit.panel[p] = a.panels + (u * kUnitPanels + p) * plan.panel_bytes;
        (rows > kernels.gemv_rows ? kernels.gemm : kernels.gemv)(unit);
        finish.first_row = u * kUnitRows;
        finish.count = n - finish.first_row < kUnitRows ? n - finish.first_row : kUnitRows;
        kernels.finish(finish);
      }
    });
  }
}

}  // namespace sparse_backend::lowbit

#include "linear.h"

#include "../cpu_features.h"
#include "../parallel.h"
#include "../scratch.h"

namespace sparse_backend::bitmask {
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
  const int64_t x_stride = round_up(k, kChunk) * kernels.x_element_bytes;
  const int64_t units = (h.parts + kUnitPanels - 1) / kUnitPanels;
  const bool batched = args.tokens > kernels.gemv_tokens;
  const int64_t block = batched ? kGemmTokens : kernels.gemv_tokens;
  const int limit = unstructured::activation_limit(h);
  const double density =
      static_cast<double>(h.stored) / (static_cast<double>(n) * static_cast<double>(k) + 1);

  thread_local Scratch prepared_memory;
  for (int64_t token = 0; token < args.tokens; token += block) {
    const int tokens = static_cast<int>(args.tokens - token < block ? args.tokens - token : block);
    uint8_t* prepared = prepared_memory.reserve(tokens * x_stride + block * int64_t{sizeof(float)});
    float* x_scales = reinterpret_cast<float*>(prepared + tokens * x_stride);
    const uint8_t* x = static_cast<const uint8_t*>(args.x) + token * x_row_bytes;
    // Waking the pool costs microseconds: work of about that size stays on this thread.
    constexpr int64_t kPrepareElements = 32768;
    constexpr int64_t kMultiplyAdds = 262144;
    parallel_ranges(pool, tokens, kPrepareElements / (k + 1) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        x_scales[t] = kernels.prepare(x + t * x_row_bytes, args.x_type, k, limit, prepared + t * x_stride);
      }
    });

    int64_t range = kMultiplyAdds / (kUnitRows * (k + 1) * tokens) + 1;
    const int64_t even_share = units / (8 * int64_t{pool.threads}) + 1;
    if (units > range && range < even_share) range = even_share;
    parallel_ranges(pool, units, range, [&](int64_t begin, int64_t end) {
      thread_local Scratch memory;
      constexpr int64_t kResultBytes = int64_t{kUnitRows} * kGemmTokens * 4;
      uint8_t* scratch = memory.reserve(kResultBytes + kScratchBytes);
      UnitArgs unit{};
      unit.chunks = (k + kChunk - 1) / kChunk;
      unit.exponents = &h.exponents;
      unit.least_decoded = unstructured::least_decoded(density, kPanelRows * kChunk);
      unit.scale_stride = n;
      unit.group_chunks = h.group_size / kChunk;
      unit.x = prepared;
      unit.x_stride = x_stride;
      unit.tokens = tokens;
      unit.out = reinterpret_cast<float*>(scratch);
      unit.scratch = scratch + kResultBytes;
      for (int64_t u = begin; u < end; ++u) {
        const int64_t first_panel = u * kUnitPanels, first_row = u * kUnitRows;
        const int64_t left = h.parts - first_panel;
        unit.panels = static_cast<int>(left < kUnitPanels ? left : kUnitPanels);
        unit.rows = static_cast<int>(n - first_row < kUnitRows ? n - first_row : kUnitRows);
        unit.scales = w.scales + first_row;
        for (int p = 0; p < unit.panels; ++p) unit.panel[p] = w.stream + w.offsets[first_panel + p];
        (batched ? kernels.gemm : kernels.gemv)(unit);
        unstructured::store_results(w, args, x_scales, token, tokens, first_row, unit.rows,
                                    [&](int t, int64_t r) { return unit.out[t * kUnitRows + r]; });
      }
    });
  }
}

}  // namespace sparse_backend::bitmask

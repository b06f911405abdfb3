#include "linear.h"

#include "../cpu_features.h"
#include "../parallel.h"
#include "../scratch.h"
#include "kernels.h"

namespace sparse_backend::bitmask {
namespace {

const Kernels& select(DType value_type, DType x_type) {
#if defined(__x86_64__)
  switch (active_isa()) {
    case Isa::kAvx512:
      if (cpu_features().avx512_bf16 && value_type == DType::kBf16 && x_type == DType::kBf16) {
        return avx512_bf16_kernels();
      }
      return avx512_kernels(value_type);
    case Isa::kAvx2:
      return avx2_kernels(value_type);
    case Isa::kScalar:
      break;
  }
#endif
  (void)x_type;
  return scalar_kernels(value_type);
}

void store_results(const View& w, const LinearArgs& args, const float* results, int64_t token, int tokens,
                   int64_t first_row, int64_t rows) {
  const int64_t n = w.header.out_features;
  for (int t = 0; t < tokens; ++t) {
    const int64_t at = (token + t) * n + first_row;
    for (int64_t r = 0; r < rows; ++r) {
      float value = results[t * kUnitRows + r];
      if (args.bias != nullptr) value += load_as_float(args.bias, args.bias_type, first_row + r);
      switch (args.x_type) {
        case DType::kBf16:
          static_cast<uint16_t*>(args.y)[at + r] = bf16_from_float(value);
          break;
        case DType::kFp16:
          static_cast<uint16_t*>(args.y)[at + r] = fp16_from_float(value);
          break;
        case DType::kFp32:
          static_cast<float*>(args.y)[at + r] = value;
          break;
      }
    }
  }
}

}  // namespace

const char* kernel_name(DType value_type, DType x_type) { return select(value_type, x_type).name; }

void linear(const View& w, const LinearArgs& args, const ThreadPool& pool) {
  const Kernels& kernels = select(static_cast<DType>(w.header.value_type), args.x_type);
  const int64_t k = w.header.in_features, n = w.header.out_features;
  const int64_t x_row_bytes = k * (args.x_type == DType::kFp32 ? 4 : 2);
  const int64_t x_stride = round_up(k, kChunk) * kernels.x_element_bytes;
  const int64_t units = (w.header.panels + kUnitPanels - 1) / kUnitPanels;
  const bool batched = args.tokens > kernels.gemv_tokens;
  const int64_t block = batched ? kGemmTokens : kernels.gemv_tokens;

  thread_local Scratch prepared_memory;
  for (int64_t token = 0; token < args.tokens; token += block) {
    const int tokens = static_cast<int>(args.tokens - token < block ? args.tokens - token : block);
    uint8_t* prepared = prepared_memory.reserve(tokens * x_stride);
    const uint8_t* x = static_cast<const uint8_t*>(args.x) + token * x_row_bytes;
    // Waking the pool costs microseconds: work of about that size stays on this thread.
    constexpr int64_t kPrepareElements = 32768;
    constexpr int64_t kMultiplyAdds = 262144;
    parallel_ranges(pool, tokens, kPrepareElements / (k + 1) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        kernels.prepare(x + t * x_row_bytes, args.x_type, k, prepared + t * x_stride);
      }
    });

    int64_t range = kMultiplyAdds / (kUnitRows * (k + 1) * tokens) + 1;
    const int64_t even_share = units / (8 * int64_t{pool.threads}) + 1;
    if (units > range && range < even_share) range = even_share;
    parallel_ranges(pool, units, range, [&](int64_t begin, int64_t end) {
      thread_local Scratch memory;
      constexpr int64_t kResultBytes = int64_t{kUnitRows} * kGemmTokens * 4;
      uint8_t* scratch = memory.reserve(kResultBytes + kGemmScratchBytes);
      UnitArgs unit{};
      unit.chunks = w.chunks;
      unit.x = prepared;
      unit.x_stride = x_stride;
      unit.tokens = tokens;
      unit.out = reinterpret_cast<float*>(scratch);
      unit.scratch = scratch + kResultBytes;
      for (int64_t u = begin; u < end; ++u) {
        const int64_t first_panel = u * kUnitPanels;
        const int64_t left = w.header.panels - first_panel;
        unit.panels = static_cast<int>(left < kUnitPanels ? left : kUnitPanels);
        for (int p = 0; p < unit.panels; ++p) unit.panel[p] = w.stream + w.offsets[first_panel + p];
        (batched ? kernels.gemm : kernels.gemv)(unit);
        const int64_t first_row = u * kUnitRows;
        const int64_t rows = n - first_row < kUnitRows ? n - first_row : kUnitRows;
        store_results(w, args, unit.out, token, tokens, first_row, rows);
      }
    });
  }
}

}  // namespace sparse_backend::bitmask

#include "linear.h"

#include "../cpu_features.h"
#include "../parallel.h"
#include "../scratch.h"
#include "../unstructured/quantise.h"

namespace sparse_backend::sell {
namespace {

const Kernels& select(Values values) {
#if defined(__x86_64__)
  switch (active_isa()) {
    case Isa::kAvx512:
      return avx512_kernels(values);
    case Isa::kAvx2:
      return avx2_kernels(values);
    case Isa::kScalar:
      break;
  }
#endif
  return scalar_kernels(values);
}

// Tokens a prepared column of the batched kernels holds: 1, 2, 4 or 8 vectors.
int token_stride(int tokens, int lanes) {
  int stride = lanes;
  while (stride < tokens) stride *= 2;
  return stride;
}

struct Call {
  const unstructured::View& weight;
  const unstructured::LinearArgs& args;
  const Kernels& kernels;
  const ThreadPool& pool;
  int64_t blocks() const { return (weight.header.in_features + kBlockColumns - 1) / kBlockColumns; }
};

// Columns of tokens, [column][stride], as floats or for integer values as int32.
void prepare_batch(const Call& c, int64_t token, int tokens, int stride, uint8_t* out, float* x_scales) {
  const int64_t k = c.weight.header.in_features, padded = c.blocks() * kBlockColumns;
  const int64_t element = element_bytes(c.args.x_type);
  const uint8_t* x = static_cast<const uint8_t*>(c.args.x) + token * k * element;
  const int limit = unstructured::activation_limit(c.weight.header);
  const bool integer = unstructured::is_integer(c.weight.header.values);
  thread_local Scratch memory;
  int16_t* narrow = reinterpret_cast<int16_t*>(memory.reserve(integer ? 2 * tokens * padded : 64));
  if (integer) {
    parallel_ranges(c.pool, tokens, 32768 / (k + 1) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        x_scales[t] = unstructured::quantise_int16(x + t * k * element, c.args.x_type, k, padded, limit,
                                                   narrow + t * padded);
      }
    });
  } else {
    for (int t = 0; t < tokens; ++t) x_scales[t] = 1.0F;
  }
  parallel_ranges(c.pool, padded, 32768 / stride, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int t = 0; t < stride; ++t) {
        uint32_t bits = 0;
        if (t < tokens && i < k) {
          bits = integer ? static_cast<uint32_t>(int32_t{narrow[t * padded + i]})
                         : bits_from_float(load_as_float(x, c.args.x_type, t * k + i));
        }
        std::memcpy(out + (i * stride + t) * 4, &bits, 4);
      }
    }
  });
}

// Tokens [token, token + tokens), one by one with gemv or together with the batched kernel.
void run(const Call& c, int64_t token, int tokens, bool gemv) {
  const unstructured::Header& h = c.weight.header;
  const int64_t k = h.in_features, n = h.out_features, padded = c.blocks() * kBlockColumns;
  const int stride = gemv ? 1 : token_stride(tokens, c.kernels.lanes);
  thread_local Scratch prepared_memory;
  const int64_t token_bytes = (padded + kBlockColumns) * c.kernels.gemv_element_bytes;  // for gemv
  const int64_t x_bytes = gemv ? tokens * token_bytes : padded * int64_t{4} * stride;
  uint8_t* prepared = prepared_memory.reserve(x_bytes + int64_t{kBatchTokens} * 4);
  float* x_scales = reinterpret_cast<float*>(prepared + x_bytes);
  if (gemv) {
    const int64_t row_bytes = k * element_bytes(c.args.x_type);
    const uint8_t* x = static_cast<const uint8_t*>(c.args.x) + token * row_bytes;
    for (int t = 0; t < tokens; ++t) {
      x_scales[t] = c.kernels.prepare(x + t * row_bytes, c.args.x_type, k, unstructured::activation_limit(h),
                                      prepared + t * token_bytes);
    }
  } else {
    prepare_batch(c, token, tokens, stride, prepared, x_scales);
  }

  // Small matrices stay on this thread: waking the pool costs microseconds. Large ones are cut into
  // at least eight pieces per thread, as some cores may be half as fast as others.
  const int64_t work = h.stored * (gemv ? tokens : stride);
  const int64_t pieces = work < 131072 ? 1 : 8 * int64_t{c.pool.threads};
  int64_t strips = h.parts / pieces;
  strips = strips < 1 ? 1 : strips > kUnitStrips ? kUnitStrips : strips;
  const int64_t units = (h.parts + strips - 1) / strips;
  parallel_ranges(c.pool, units, work < 131072 ? units : 1, [&](int64_t begin, int64_t end) {
    thread_local Scratch memory;
    const int64_t out_bytes = int64_t{kUnitRows} * stride * 4;
    uint8_t* scratch = memory.reserve(out_bytes + kScratchBytes);
    UnitArgs unit{};
    unit.blocks = c.blocks();
    unit.exponents = &h.exponents;
    unit.scale_stride = n;
    unit.group_blocks = h.group_size / kBlockColumns;
    unit.x = prepared;
    unit.token_stride = stride;
    unit.out = reinterpret_cast<float*>(scratch);
    unit.scratch = scratch + out_bytes;
    for (int64_t u = begin; u < end; ++u) {
      const int64_t first = u * strips, first_row = first * kStripRows;
      unit.strips = static_cast<int>(h.parts - first < strips ? h.parts - first : strips);
      unit.scales = c.weight.scales + first_row;
      for (int s = 0; s < unit.strips; ++s) unit.strip[s] = c.weight.stream + c.weight.offsets[first + s];
      int64_t rows = unit.strips * int64_t{kStripRows};
      if (n - first_row < rows) rows = n - first_row;
      const auto store = [&](int first_token, int count) {
        unstructured::store_results(c.weight, c.args, x_scales + first_token, token + first_token, count,
                                    first_row, rows,
                                    [&](int t, int64_t r) { return unit.out[r * stride + t]; });
      };
      if (!gemv) {
        c.kernels.batch(unit);
        store(0, tokens);
      }
      for (int t = 0; gemv && t < tokens; ++t) {  // from the second token on the unit comes from the L2 cache
        unit.x = prepared + t * token_bytes;
        c.kernels.gemv(unit);
        store(t, 1);
      }
    }
  });
}

}  // namespace

const char* kernel_name(Values values) { return select(values).name; }

void linear(const unstructured::View& w, const unstructured::LinearArgs& args, const ThreadPool& pool) {
  linear_with(select(w.header.values), w, args, pool);
}

void linear_with(const Kernels& kernels, const unstructured::View& w, const unstructured::LinearArgs& args,
                 const ThreadPool& pool) {
  const Call call{w, args, kernels, pool};
  const bool gemv = call.kernels.gemv != nullptr && call.kernels.gemv_takes(args.x_type);
  for (int64_t token = 0; token < args.tokens; token += kBatchTokens) {
    const int64_t left = args.tokens - token;
    const int tokens = static_cast<int>(left < kBatchTokens ? left : kBatchTokens);
    run(call, token, tokens, gemv && tokens <= kernels.gemv_tokens);
  }
}

}  // namespace sparse_backend::sell

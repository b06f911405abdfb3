#include "linear.h"

#include "../cpu_features.h"
#include "../parallel.h"
#include "../scratch.h"
#include "../unstructured/quantise.h"
#include "../unstructured/select.h"

namespace sparse_backend::sell {
namespace {

constexpr unstructured::Levels<Kernels> kLevels{
    scalar_kernels,
#if defined(__x86_64__)
    avx2_kernels,
    avx512_kernels,
    avx512_bf16_kernels,
#endif
};

#if defined(__x86_64__)
constexpr unstructured::Levels<unstructured::StripKernels> kTiles{
    nullptr, nullptr, nullptr, nullptr, nullptr, amx_kernels, amx_byte_kernels};
#endif

// Tokens a prepared column of the batched kernels holds: 1, 2, 4 or 8 vectors.
int token_stride(int tokens, int lanes) {
  int stride = lanes;
  while (stride < tokens) stride *= 2;
  return stride;
}

// Up to so many tokens AVX-512 is faster than placing weights in tiles (amx.cpp). Sums of floats are rounded
// in another order there.
constexpr int64_t kTokensBeforeTiles = 24;

bool tiles_win(Values values, DType x_type, int64_t tokens) {
  return tokens > kTokensBeforeTiles && active_isa() == Isa::kAmx &&
         unstructured::takes_tiles(values, x_type);
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

// Activations for gemv.
void prepare_gemv(const Call& c, int64_t token, int tokens, uint8_t* out, float* x_scales) {
  const int64_t k = c.weight.header.in_features, row_bytes = k * element_bytes(c.args.x_type);
  const auto* x = static_cast<const uint8_t*>(c.args.x) + token * row_bytes;
  const int limit = unstructured::activation_limit(c.weight.header);
  parallel_ranges(c.pool, tokens, 32768 / (k + 1) + 1, [&](int64_t begin, int64_t end) {
    thread_local Scratch memory;
    auto* spare = reinterpret_cast<int16_t*>(memory.reserve(2 * c.blocks() * kBlockColumns + 64));
    for (int64_t t = begin; t < end; ++t) {
      x_scales[t] = c.kernels.prepare(x + t * row_bytes, c.args.x_type, k, limit, static_cast<int>(t), tokens,
                                      spare, out);
    }
  });
}

// Tokens [token, token + tokens), with gemv or with the batched kernel.
void run(const Call& c, int64_t token, int tokens, bool gemv) {
  const unstructured::Header& h = c.weight.header;
  const int64_t n = h.out_features, padded = c.blocks() * kBlockColumns;
  const int stride = token_stride(tokens, c.kernels.lanes);
  thread_local Scratch prepared_memory;
  const int64_t x_bytes = gemv ? tokens * padded * 2 : padded * int64_t{4} * stride;
  uint8_t* prepared = prepared_memory.reserve(x_bytes + int64_t{kBatchTokens} * 4);
  float* x_scales = reinterpret_cast<float*>(prepared + x_bytes);
  if (gemv) {
    prepare_gemv(c, token, tokens, prepared, x_scales);
  } else {
    prepare_batch(c, token, tokens, stride, prepared, x_scales);
  }

  // Small matrices stay on this thread: waking the pool costs microseconds. Large ones are cut into
  // at least eight pieces per thread, as some cores may be half as fast as others.
  const int64_t work = h.stored * (gemv ? tokens : stride);
  const int64_t pieces = work < 131072 ? 1 : 8 * int64_t{c.pool.threads};
  const int64_t most = gemv && reads_one_stream() ? 1 : kUnitStrips;
  int64_t strips = h.parts / pieces;
  strips = strips < 1 ? 1 : strips > most ? most : strips;
  const int64_t units = (h.parts + strips - 1) / strips;
  const int64_t range = units / pieces > 0 ? units / pieces : 1;
  parallel_ranges(c.pool, units, work < 131072 ? units : range, [&](int64_t begin, int64_t end) {
    thread_local Scratch memory;
    // Not a power of two: all tokens' results would be in the same few sets of the cache.
    const int64_t out_stride = strips * kStripRows + 16;
    const int64_t out_bytes = round_up((gemv ? tokens * out_stride : strips * kStripRows * stride) * 4, 64);
    uint8_t* scratch = memory.reserve(out_bytes + kScratchBytes);
    UnitArgs unit{};
    unit.blocks = c.blocks();
    unit.exponents = &h.exponents;
    unit.scale_stride = n;
    unit.group_blocks = h.group_size / kBlockColumns;
    unit.x = prepared;
    unit.tokens = tokens;
    unit.token_stride = stride;
    unit.out = reinterpret_cast<float*>(scratch);
    unit.out_stride = out_stride;
    unit.scratch = scratch + out_bytes;
    for (int64_t u = begin; u < end; ++u) {
      const int64_t first = u * strips, first_row = first * kStripRows;
      unit.strips = static_cast<int>(h.parts - first < strips ? h.parts - first : strips);
      unit.scales = c.weight.scales + first_row;
      for (int s = 0; s < unit.strips; ++s) unit.strip[s] = c.weight.stream + c.weight.offsets[first + s];
      int64_t rows = unit.strips * int64_t{kStripRows};
      if (n - first_row < rows) rows = n - first_row;
      (gemv ? c.kernels.gemv : c.kernels.batch)(unit);
      unstructured::store_results(c.weight, c.args, x_scales, token, tokens, first_row, rows,
                                  [&](int t, float* out) {
                                    if (gemv) {
                                      std::memcpy(out, unit.out + t * out_stride, rows * sizeof(float));
                                      return;
                                    }
                                    for (int64_t r = 0; r < rows; ++r) out[r] = unit.out[r * stride + t];
                                  });
    }
  });
}

}  // namespace

const char* kernel_name(Values values, DType x_type) {
  return tiles_win(values, x_type, kTokensBeforeTiles + 1) ? "amx" : level_name(kLevels, values, x_type);
}

void linear(const unstructured::View& w, const unstructured::LinearArgs& args, const ThreadPool& pool) {
#if defined(__x86_64__)
  if (tiles_win(w.header.values, args.x_type, args.tokens)) {
    return strips_linear(select(kTiles, w.header, args), w, args, pool);
  }
#endif
  linear_with(select(kLevels, w.header, args), w, args, pool);
}

void linear_with(const Kernels& kernels, const unstructured::View& w, const unstructured::LinearArgs& args,
                 const ThreadPool& pool) {
  const Call call{w, args, kernels, pool};
  const bool takes = kernels.gemv != nullptr && kernels.gemv_takes(args.x_type);
  for (int64_t token = 0; token < args.tokens; token += kBatchTokens) {
    const int64_t left = args.tokens - token;
    const int tokens = static_cast<int>(left < kBatchTokens ? left : kBatchTokens);
    run(call, token, tokens, takes && tokens <= kernels.gemv_most);
  }
}

}  // namespace sparse_backend::sell

#include "pointwise.h"

#include "../cpu_features.h"
#include "../parallel.h"
#include "../scratch.h"
#include "kernels.h"

namespace sparse_backend::layers {
namespace {

// Elements that cost about as much as waking the thread pool.
constexpr int64_t kSmall = 32768;

}  // namespace

const Kernels& kernels() {
#if defined(__x86_64__)
  switch (active_isa()) {
    case Isa::kAmx:
    case Isa::kAvx512:
      return avx512_kernels();
    case Isa::kAvx2:
      return avx2_kernels();
    case Isa::kScalar:
      break;
  }
#endif
  return scalar_kernels();
}

void rms_norm(const RmsNormArgs& a, const ThreadPool& pool) {
  const Kernels& k = kernels();
  const int64_t row = a.size * element_bytes(a.type);
  parallel_ranges(pool, a.tokens, kSmall / (a.size + 1) + 1, [&](int64_t begin, int64_t end) {
    thread_local Scratch memory;
    NormArgs n{};
    n.weight = a.weight;
    n.weight_type = a.weight_type;
    n.size = a.size;
    n.eps = a.eps;
    n.round_before_weight = a.round_before_weight;
    n.scratch = reinterpret_cast<float*>(memory.reserve(a.size * 4));
    for (int64_t t = begin; t < end; ++t) {
      n.x = static_cast<const uint8_t*>(a.x) + t * row;
      n.y = static_cast<uint8_t*>(a.y) + t * row;
      if (a.residual != nullptr) {
        n.residual = static_cast<const uint8_t*>(a.residual) + t * row;
        n.sum = static_cast<uint8_t*>(a.sum) + t * row;
      }
      k.norm[static_cast<int>(a.type)](n);
    }
  });
}

void rotary_embedding(const RotaryArgs& a, const ThreadPool& pool) {
  const Kernels& k = kernels();
  const int64_t work = a.heads * a.rotary_dim + 1;
  parallel_ranges(pool, a.tokens, kSmall / work + 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      RotateArgs r{};
      r.x = static_cast<uint8_t*>(a.x) + t * a.stride * element_bytes(a.type);
      r.heads = a.heads;
      r.head_stride = a.head_dim;
      r.rotary_dim = a.rotary_dim;
      r.cos = a.cos_sin + a.positions[t] * a.rotary_dim;
      r.sin = r.cos + a.rotary_dim / 2;
      r.halves = a.halves;
      k.rotate[static_cast<int>(a.type)](r);
    }
  });
}

void silu_and_mul(const void* x, DType type, int64_t tokens, int64_t size, void* out,
                  const ThreadPool& pool) {
  const auto run = kernels().silu[static_cast<int>(type)];
  const int64_t row = size * element_bytes(type);
  parallel_ranges(pool, tokens, kSmall / (size + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const uint8_t* gates = static_cast<const uint8_t*>(x) + 2 * t * row;
      run(gates, gates + row, size, static_cast<uint8_t*>(out) + t * row);
    }
  });
}

}  // namespace sparse_backend::layers

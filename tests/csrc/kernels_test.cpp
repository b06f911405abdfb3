// The C++ without torch: every kernel against float64 on exactly-sized buffers. Built by
// tools/run_asan.py with sanitizers, and by test_avx512.py with emulated intrinsics.
#include "bitmask/kernels.h"

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "bitmask/layout.h"
#include "bitmask/linear.h"
#include "bitmask/pack.h"
#include "cpu_features.h"
#include "support.h"

namespace bm = sparse_backend::bitmask;
using sb::DType;

namespace {

struct Weight {
  int64_t n, k;
  DType type;
  std::vector<uint16_t> dense, values;
  std::vector<uint8_t> mask;
  std::vector<int64_t> start;
  Buffer machine;
  bm::View view;

  double at(int64_t row, int64_t column) const {
    const uint16_t w = dense[row * k + column];
    return type == DType::kBf16 ? sb::float_from_bf16(w) : sb::float_from_fp16(w);
  }
};

Weight make_weight(int64_t n, int64_t k, double zeros, DType type, std::mt19937& rng) {
  Weight w{n, k, type, {}, {}, {}, {}, nullptr, {}};
  std::uniform_real_distribution<float> uniform(0, 1);
  std::normal_distribution<float> normal;
  w.dense.resize(n * k);
  for (auto& v : w.dense) {
    const float value = normal(rng);
    v = uniform(rng) < zeros   ? 0
        : type == DType::kBf16 ? sb::bf16_from_float(value)
                               : sb::fp16_from_float(value);
  }
  w.mask.resize(n * bm::mask_stride(k));
  w.start.assign(n + 1, 0);
  bm::pack_mask(w.dense.data(), type, n, k, w.mask.data(), w.start.data() + 1, kThreads);
  for (int64_t i = 0; i < n; ++i) w.start[i + 1] += w.start[i];
  w.values.resize(w.start[n]);
  bm::pack_values(w.dense.data(), n, k, w.start.data(), w.values.data(), kThreads);

  std::vector<int64_t> again(n + 1);
  if (!bm::row_starts(w.mask.data(), n, k, again.data(), kThreads) || again != w.start)
    fail("row_starts", "", n, k, 0);
  const bm::Canonical canonical{n, k, type, w.mask.data(), w.values.data(), w.start[n]};
  std::vector<uint16_t> back(n * k);
  bm::unpack(canonical, w.start.data(), back.data(), kThreads);
  if (back != w.dense) fail("unpack", "", n, k, 0);
  const int64_t bytes = bm::machine_bytes(n, k, w.start[n]);
  w.machine = allocate(bytes);
  bm::lower(canonical, w.start.data(), w.machine.get(), kThreads);
  if (const char* problem = bm::parse(w.machine.get(), bytes, &w.view)) fail(problem, "parse", n, k, 0);
  return w;
}

void check_kernels(const bm::Kernels& kernels, const Weight& w, int tokens, DType x_type, std::mt19937& rng) {
  std::normal_distribution<float> normal;
  const int64_t element = x_type == DType::kFp32 ? 4 : 2;
  std::vector<float> x(tokens * w.k);
  Buffer raw = allocate(tokens * w.k * element, 16);
  for (int64_t i = 0; i < tokens * w.k; ++i) {
    const uint16_t bf16 = sb::bf16_from_float(normal(rng));  // exact in every type tested
    x[i] = sb::float_from_bf16(bf16);
    if (x_type == DType::kFp32) reinterpret_cast<float*>(raw.get())[i] = x[i];
    if (x_type == DType::kBf16) reinterpret_cast<uint16_t*>(raw.get())[i] = bf16;
    if (x_type == DType::kFp16) {
      reinterpret_cast<uint16_t*>(raw.get())[i] = sb::fp16_from_float(x[i]);
      x[i] = sb::float_from_fp16(sb::fp16_from_float(x[i]));
    }
  }
  const int64_t stride = sb::round_up(w.k, bm::kChunk) * kernels.x_element_bytes;
  Buffer prepared = allocate(tokens * stride);
  for (int t = 0; t < tokens; ++t) {
    kernels.prepare(raw.get() + t * w.k * element, x_type, w.k, prepared.get() + t * stride);
  }
  Buffer scratch = allocate(bm::kGemmScratchBytes);
  for (int64_t u = 0; u * bm::kUnitPanels < w.view.header.panels; ++u) {
    bm::UnitArgs args{};
    const int64_t left = w.view.header.panels - u * bm::kUnitPanels;
    args.panels = static_cast<int>(left < bm::kUnitPanels ? left : bm::kUnitPanels);
    for (int p = 0; p < args.panels; ++p)
      args.panel[p] = w.view.stream + w.view.offsets[u * bm::kUnitPanels + p];
    args.chunks = w.view.chunks;
    args.x = prepared.get();
    args.x_stride = stride;
    args.tokens = tokens;
    args.scratch = scratch.get();
    std::vector<float> one(tokens * bm::kUnitRows, NAN), other(tokens * bm::kUnitRows, NAN);
    args.out = other.data();
    kernels.gemm(args);
    args.out = one.data();
    (tokens <= kernels.gemv_tokens ? kernels.gemv : kernels.gemm)(args);
    for (int t = 0; t < tokens; ++t) {
      for (int r = 0; r < bm::kUnitRows && u * bm::kUnitRows + r < w.n; ++r) {
        const int64_t row = u * bm::kUnitRows + r;
        double expected = 0, scale = 0;
        for (int64_t c = 0; c < w.k; ++c) {
          expected += w.at(row, c) * x[t * w.k + c];
          scale += std::fabs(w.at(row, c) * x[t * w.k + c]);
        }
        const float got = one[t * bm::kUnitRows + r];
        if (!(std::fabs(got - expected) <= 1e-6 * scale + 1e-30))
          return fail("value", kernels.name, w.n, w.k, tokens);
        if (got != other[t * bm::kUnitRows + r])
          return fail("gemv and gemm differ", kernels.name, w.n, w.k, tokens);
      }
    }
  }
}

void check_linear(const Weight& w, int tokens, DType x_type) {
  const int64_t element = x_type == DType::kFp32 ? 4 : 2;
  Buffer x = allocate(tokens * w.k * element, 16), bias = allocate(w.n * 4, 16);
  Buffer y1 = allocate(tokens * w.n * element, 16), y3 = allocate(tokens * w.n * element, 16);
  for (int64_t i = 0; i < tokens * w.k * element; ++i) x.get()[i] = static_cast<uint8_t>(i % 61);
  for (int64_t i = 0; i < w.n; ++i) reinterpret_cast<float*>(bias.get())[i] = static_cast<float>(i);
  bm::LinearArgs args{x.get(), x_type, tokens, bias.get(), DType::kFp32, y1.get()};
  bm::linear(w.view, args, kOneThread);
  args.y = y3.get();
  bm::linear(w.view, args, kThreads);
  if (std::memcmp(y1.get(), y3.get(), tokens * w.n * element) != 0)
    fail("threads", "linear", w.n, w.k, tokens);
}

// Any 64 bytes as a header: parse() must refuse or accept, never read past the buffer.
void check_hostile_headers(const Weight& w, std::mt19937& rng) {
  const int64_t bytes = w.view.header.total_bytes;
  Buffer copy = allocate(bytes);
  for (int i = 0; i < 4000; ++i) {
    std::memcpy(copy.get(), w.machine.get(), bytes);
    copy.get()[rng() % 64] ^= static_cast<uint8_t>(1U << (rng() % 8));
    bm::View view;
    bm::parse(copy.get(), i % 7 == 0 ? static_cast<int64_t>(rng() % bytes) : bytes, &view);
  }
}

}  // namespace

int main() {
  std::mt19937 rng(7);
  std::vector<const bm::Kernels*> levels[2];
  for (const DType type : {DType::kBf16, DType::kFp16}) {
    auto& list = levels[static_cast<int>(type)];
    list.push_back(&bm::scalar_kernels(type));
#if defined(SPARSE_BACKEND_EMULATE_AVX512)
    list.push_back(&bm::avx512_kernels(type));
    if (type == DType::kBf16) list.push_back(&bm::avx512_bf16_kernels());
#else
    if (sb::cpu_features().avx2) list.push_back(&bm::avx2_kernels(type));
    if (sb::cpu_features().avx512) list.push_back(&bm::avx512_kernels(type));
    if (sb::cpu_features().avx512_bf16 && type == DType::kBf16) list.push_back(&bm::avx512_bf16_kernels());
#endif
  }
  const int64_t shapes[][2] = {{1, 1}, {3, 7}, {4, 64}, {5, 65}, {16, 31}, {17, 257}, {33, 600}, {2, 1025}};
  for (const auto& shape : shapes) {
    for (const double zeros : {0.0, 0.5, 0.95, 1.0}) {
      for (const DType type : {DType::kBf16, DType::kFp16}) {
        const Weight w = make_weight(shape[0], shape[1], zeros, type, rng);
        for (const bm::Kernels* kernels : levels[static_cast<int>(type)]) {
          for (const int tokens : {1, 2, 3, 4, 5, 6, 7, 8, 9, 13}) {
            for (const DType x_type : {DType::kBf16, DType::kFp16, DType::kFp32}) {
              const bool bf16_only = kernels->x_element_bytes == 2;
              if (bf16_only && x_type != DType::kBf16) continue;
              check_kernels(*kernels, w, tokens, x_type, rng);
            }
          }
        }
#if !defined(SPARSE_BACKEND_EMULATE_AVX512)
        for (int level = 0; level <= static_cast<int>(sb::best_isa()); ++level) {
          sb::set_isa(static_cast<sb::Isa>(level));
          for (const int tokens : {1, 6, 97}) check_linear(w, tokens, DType::kBf16);
          check_linear(w, 3, DType::kFp16);
          check_linear(w, 3, DType::kFp32);
        }
        check_hostile_headers(w, rng);
#endif
      }
    }
  }
  test_lowbit();
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}

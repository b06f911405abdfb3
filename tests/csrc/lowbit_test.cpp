// The low-bit kernels without torch: exact sums against int64, canonical codes there and back,
// hostile headers.
#include <cmath>
#include <random>

#include "cpu_features.h"
#include "lowbit/kernels.h"
#include "lowbit/linear.h"
#include "lowbit/pack.h"
#include "support.h"

namespace lb = sparse_backend::lowbit;
using lb::Storage;
using sb::DType;

namespace {

struct Weight {
  lb::Header header;
  lb::Plan plan;
  std::vector<int8_t> values;
  Buffer machine;
};

Weight make_weight(int64_t n, int64_t k, Storage storage, int group, std::mt19937& rng) {
  const int limbs = storage == Storage::kInt8 ? 2 : 1;
  Weight w{{lb::kMagic, storage, n, k, group, limbs}, lb::make_plan(storage, k, group), {}, nullptr};
  const int limit = storage == Storage::kInt8 ? 127 : 1;
  w.values.resize(n * k);
  for (auto& v : w.values) v = static_cast<int8_t>(static_cast<int>(rng() % (2 * limit + 1)) - limit);
  const int64_t bytes = lb::machine_bytes(w.plan, n);
  w.machine = allocate(bytes);
  if (lb::lower(w.values.data(), w.header, w.machine.get(), kThreads) != 0) fail("lower", "", n, k, 0);
  lb::Header again;
  if (lb::parse(w.machine.get(), bytes, &again) != nullptr) fail("parse", "", n, k, 0);
  if (storage == Storage::kInt8) return w;
  const int per_byte = static_cast<int>(storage);
  std::vector<uint8_t> canonical(n * lb::canonical_stride(k, per_byte));
  std::vector<int8_t> back(n * k);
  if (lb::encode(w.values.data(), n, k, per_byte, canonical.data(), kThreads) != 0 ||
      lb::decode(canonical.data(), n, k, per_byte, back.data(), kThreads) != 0 || back != w.values) {
    fail("canonical codes", "", n, k, per_byte);
  }
  return w;
}

// Activations at the ends of their range, where narrow sums would overflow first.
void check_kernels(const lb::Kernels& kernels, const Weight& w, int rows, std::mt19937& rng) {
  const int64_t n = w.header.out_features, k = w.header.in_features;
  const bool int8 = w.header.storage == Storage::kInt8;
  Buffer x = allocate(rows * w.plan.padded);
  for (int r = 0; r < rows; ++r) {
    int8_t* row = reinterpret_cast<int8_t*>(x.get()) + r * w.plan.padded;
    for (int64_t i = 0; i < w.plan.padded; ++i) {
      const int random = static_cast<int>(rng() % 256) - 128;
      const int end = r % 3 == 0 ? random : r % 3 == 1 ? 127 : -128;
      row[i] = static_cast<int8_t>(i >= k ? 0 : int8 && end < -127 ? -127 : end);
    }
  }
  Buffer tiles = allocate(rows * w.plan.padded);
  lb::arrange_tiles(reinterpret_cast<const int8_t*>(x.get()), w.plan.padded, rows, 0, rows,
                    reinterpret_cast<int8_t*>(tiles.get()));
  Buffer scratch = allocate(lb::kScratchBytes);
  const int64_t panels = lb::panel_count(n), sums = w.plan.segments * rows * lb::kUnitRows;
  for (int64_t u = 0; u * lb::kUnitPanels < panels; ++u) {
    lb::UnitArgs a{};
    a.plan = &w.plan;
    const int64_t left = panels - u * lb::kUnitPanels;
    a.panels = static_cast<int>(left < lb::kUnitPanels ? left : lb::kUnitPanels);
    for (int p = 0; p < a.panels; ++p) {
      a.panel[p] = w.machine.get() + lb::kHeaderBytes + (u * lb::kUnitPanels + p) * w.plan.panel_bytes;
    }
    a.x = reinterpret_cast<const int8_t*>(x.get());
    a.x_stride = w.plan.padded;
    a.rows = rows;
    a.scratch = scratch.get();
    for (const int way : {0, 1, 2}) {  // gemv with several streams of memory and with one, gemm
      const bool batched = way == 2;
      if (!batched && rows > kernels.gemv_rows) continue;
      a.one_stream = way == 1;
      Buffer out = allocate(sums * 4);
      std::memset(out.get(), 0xAB, sums * 4);
      a.out = reinterpret_cast<int32_t*>(out.get());
      a.x_tiles = batched && kernels.tiles ? reinterpret_cast<const int8_t*>(tiles.get()) : nullptr;
      (batched ? kernels.gemm : kernels.gemv)(a);
      for (int64_t s = 0; s < w.plan.segments; ++s) {
        const int64_t begin = s * w.plan.segment, end = w.plan.segment > 0 ? begin + w.plan.segment : k;
        for (int r = 0; r < rows; ++r) {
          for (int i = 0; i < lb::kUnitRows && u * lb::kUnitRows + i < n; ++i) {
            // What is asked of a kernel is the sum of codes: finish() takes the offset off. A kernel
            // for int8 may give the sum of weights instead; either is exact.
            int64_t weights = 0, codes = 0;
            for (int64_t c = begin; c < end && c < k; ++c) {
              const int64_t value = w.values[(u * lb::kUnitRows + i) * k + c];
              const int64_t xv = a.x[r * a.x_stride + c];
              weights += value * xv;
              codes += (value + (int8 ? 128 : 1)) * xv;
            }
            const int32_t got = a.out[(s * rows + r) * lb::kUnitRows + i];
            if (got != codes && !(int8 && got == weights)) {
              return fail(batched ? "gemm" : "gemv", kernels.name, n, k, rows);
            }
          }
        }
      }
    }
  }
}

void check_hostile_headers(const Weight& w, std::mt19937& rng) {
  const int64_t bytes = lb::machine_bytes(w.plan, w.header.out_features);
  Buffer copy = allocate(bytes);
  for (int i = 0; i < 2000; ++i) {
    std::memcpy(copy.get(), w.machine.get(), bytes);
    copy.get()[rng() % 40] ^= static_cast<uint8_t>(1U << (rng() % 8));
    lb::Header header;
    lb::parse(copy.get(), i % 7 == 0 ? static_cast<int64_t>(rng() % bytes) : bytes, &header);
  }
}

void check_linear(const Weight& w, int tokens, DType type, std::mt19937& rng) {
  const int64_t n = w.header.out_features, k = w.header.in_features, element = type == DType::kFp32 ? 4 : 2;
  const int64_t groups = w.header.group_size > 0 ? (k + w.header.group_size - 1) / w.header.group_size : 1;
  Buffer x = allocate(tokens * k * element, 16), scales = allocate(groups * n * 2, 16);
  Buffer first = allocate(tokens * n * element, 16), other = allocate(tokens * n * element, 16);
  // Any bits at all as activations: NaN, infinities and subnormals among them.
  for (int64_t i = 0; i < tokens * k * element; ++i) x.get()[i] = static_cast<uint8_t>(rng());
  for (int64_t i = 0; i < groups * n; ++i) reinterpret_cast<uint16_t*>(scales.get())[i] = 0x3F80;
  lb::LinearArgs a{};
  a.header = w.header;
  a.panels = w.machine.get() + lb::kHeaderBytes;
  a.scales = scales.get();
  a.scale_type = DType::kBf16;
  a.x = x.get();
  a.x_type = type;
  a.tokens = tokens;
  bool started = false;
  for (int level = 0; level <= static_cast<int>(sb::best_isa()); ++level) {
    sb::set_isa(static_cast<sb::Isa>(level));
    for (const auto* pool : {&kOneThread, &kThreads}) {
      sb::set_reads_one_stream(pool == &kThreads);
      a.y = started ? other.get() : first.get();
      lb::linear(a, *pool);
      if (started && std::memcmp(first.get(), other.get(), tokens * n * element) != 0) {
        fail("levels, threads or streams differ", lb::kernel_name(), n, k, tokens);
      }
      started = true;
    }
  }
}

}  // namespace

void test_lowbit() {
  std::mt19937 rng(11);
  std::vector<const lb::Kernels*> levels = {&lb::scalar_kernels()};
#if defined(SPARSE_BACKEND_EMULATE_AVX512)
  for (const auto* kernels : {&lb::avx512_vnni_kernels(), &lb::amx_kernels()}) levels.push_back(kernels);
  if (sb::cpu_features().avx2) levels.push_back(&lb::avx_vnni_kernels());
#else
  if (sb::cpu_features().avx2) levels.push_back(&lb::avx2_kernels());
  if (sb::cpu_features().avx_vnni) levels.push_back(&lb::avx_vnni_kernels());
  if (sb::cpu_features().avx512_vnni) levels.push_back(&lb::avx512_vnni_kernels());
  if (sb::best_isa() >= sb::Isa::kAmx) levels.push_back(&lb::amx_kernels());
#endif
  const int64_t shapes[][2] = {{1, 1},   {3, 7},    {16, 16},   {17, 20},
                               {31, 65}, {33, 600}, {40, 1299}, {5, 2600}};
  for (const auto& shape : shapes) {
    for (const Storage storage : {Storage::kTwoBits, Storage::kFiveTrits, Storage::kInt8}) {
      for (const int group : {0, 32, 128}) {
        if (group > 0 && storage == Storage::kInt8) continue;
        const Weight w = make_weight(shape[0], shape[1], storage, group, rng);
        for (const auto* kernels : levels) {
          for (const int rows : {1, 2, 3, 4, 5, 8, 13, 18, 27, 50}) check_kernels(*kernels, w, rows, rng);
        }
        check_hostile_headers(w, rng);
#if !defined(SPARSE_BACKEND_EMULATE_AVX512)
        for (const int tokens : {1, 7, 40})
          check_linear(w, tokens, tokens == 7 ? DType::kFp16 : DType::kBf16, rng);
        check_linear(w, 3, DType::kFp32, rng);
#endif
      }
    }
  }
  // The longest row there may be, at the ends of the range: no sum may overflow.
  const Weight longest = make_weight(16, lb::kMaxColumns, Storage::kTwoBits, 0, rng);
  for (const auto* kernels : levels) check_kernels(*kernels, longest, 3, rng);
  const Weight widest = make_weight(16, lb::kMaxColumns, Storage::kInt8, 0, rng);
  for (const auto* kernels : levels) check_kernels(*kernels, widest, 2, rng);
}

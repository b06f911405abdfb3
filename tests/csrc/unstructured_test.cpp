// The C++ without torch: every kernel of the unstructured formats against float64 on exactly-sized
// buffers. Built by tools/run_asan.py with sanitizers, and by test_avx512.py with emulated intrinsics.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bitmask/linear.h"
#include "bitmask/pack.h"
#include "cpu_features.h"
#include "lanes/linear.h"
#include "lanes/pack.h"
#include "sell/linear.h"
#include "sell/pack.h"
#include "support.h"
#include "unstructured/strips.h"

namespace bm = sparse_backend::bitmask;
namespace lanes = sparse_backend::lanes;
namespace sell = sparse_backend::sell;
namespace un = sparse_backend::unstructured;
using sb::DType;
using un::Values;

namespace {

// One implementation of one kind of values, with the float types of activations it takes.
struct Implementation {
  std::string name;
  const un::Stream* stream;
  Values values;
  bool bf16_only;
  bool same_everywhere;  // results do not depend on the instruction set
  std::vector<int> groups;
  void (*run)(const void* kernels, const un::View&, const un::LinearArgs&, const sb::ThreadPool&);
  const void* kernels;
  bool int8_activations = false;  // no others
};

struct Weight {
  int64_t n, k;
  std::vector<double> dense;  // what the machine form stands for
  Buffer machine;
  un::View view;
};

float float_of(uint16_t bits, DType type) {
  return type == DType::kBf16 ? sb::float_from_bf16(bits) : sb::float_from_fp16(bits);
}

Weight make_weight(const Implementation& impl, int64_t n, int64_t k, double zeros, int group,
                   int activation_bits, std::mt19937& rng) {
  Weight w{n, k, {}, nullptr, {}};
  std::uniform_real_distribution<float> uniform(0, 1);
  std::normal_distribution<float> normal;
  const DType type = impl.values == Values::kFp16 ? DType::kFp16 : DType::kBf16;
  std::vector<uint16_t> dense(n * k);
  for (auto& v : dense) {
    // One value in 3000 has an exponent of its own: coded bf16 needs its escapes.
    const float value = normal(rng) * (uniform(rng) < 3e-4 && type == DType::kBf16 ? 0x1p40F : 1.0F);
    v = uniform(rng) < zeros   ? 0
        : type == DType::kBf16 ? sb::bf16_from_float(value)
                               : sb::fp16_from_float(value);
  }
  std::vector<uint8_t> mask(n * un::mask_stride(k));
  std::vector<int64_t> start(n + 1, 0), again(n + 1);
  bm::pack_mask(dense.data(), type, n, k, mask.data(), start.data() + 1, kThreads);
  for (int64_t i = 0; i < n; ++i) start[i + 1] += start[i];
  std::vector<uint16_t> values(start[n]);
  bm::pack_values(dense.data(), n, k, start.data(), values.data(), kThreads);
  if (!un::row_starts(mask.data(), n, k, again.data(), kThreads) || again != start) {
    fail("row_starts", "", n, k, 0);
  }
  un::Canonical canonical{
      n, k, type == DType::kBf16 ? Values::kBf16 : Values::kFp16, mask.data(), values.data(), start[n]};
  std::vector<uint16_t> back(n * k);
  bm::unpack(canonical, start.data(), back.data(), kThreads);
  if (back != dense) fail("unpack", "", n, k, 0);

  w.dense.resize(n * k);
  const bool integer = un::is_integer(impl.values);
  const int64_t groups = group > 0 ? (k + group - 1) / group : 1;
  std::vector<float> scales(n * groups);
  for (auto& s : scales) s = 0.25F + uniform(rng);
  std::vector<int8_t> codes(start[n]);
  const int most = impl.values == Values::kInt4 ? 7 : 127;
  for (auto& c : codes) c = static_cast<int8_t>(static_cast<int>(rng() % (2 * most + 1)) - most);
  for (int64_t row = 0, i = 0; row < n; ++row) {
    for (int64_t c = 0; c < k; ++c) {
      const bool stored = (mask[row * un::mask_stride(k) + c / 8] >> (c % 8)) & 1;
      double& value = w.dense[row * k + c];
      value = integer ? 0 : float_of(dense[row * k + c], type);
      if (integer && stored) value = codes[i] * double{scales[row * groups + (group > 0 ? c / group : 0)]};
      i += stored;
    }
  }
  if (integer) {
    canonical.values = impl.values;
    canonical.data = codes.data();
  }
  const un::Settings settings{impl.values == Values::kBf16x12, group, integer ? activation_bits : 0};
  const un::Built built = un::build(canonical, start.data(), settings, *impl.stream, {}, kThreads);
  const int64_t bytes = built.header.total_bytes;
  w.machine = allocate(bytes);
  un::write(built, canonical, start.data(), scales.data(), w.machine.get(), kThreads);
  // Lowering has vector code, and everywhere the same result.
  const sb::Isa level = sb::active_isa();
  Buffer plain = allocate(bytes);
  sb::set_isa(sb::Isa::kScalar);
  un::write(built, canonical, start.data(), scales.data(), plain.get(), kThreads);
  sb::set_isa(level);
  if (std::memcmp(plain.get(), w.machine.get(), bytes) != 0) fail("lowering", impl.name.c_str(), n, k, 0);
  if (const char* problem =
          un::parse(w.machine.get(), bytes, impl.stream->magic, impl.stream->rows_per_part, &w.view)) {
    fail(problem, "parse", n, k, 0);
  }
  return w;
}

struct Activations {
  std::vector<double> exact;
  Buffer raw;
  DType type;
};

Activations make_activations(int tokens, int64_t k, DType type, std::mt19937& rng) {
  Activations x{std::vector<double>(tokens * k), allocate(tokens * k * sb::element_bytes(type), 16), type};
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < tokens * k; ++i) {
    const float value = sb::float_from_bf16(sb::bf16_from_float(normal(rng)));
    if (type == DType::kFp32) reinterpret_cast<float*>(x.raw.get())[i] = value;
    if (type == DType::kBf16) reinterpret_cast<uint16_t*>(x.raw.get())[i] = sb::bf16_from_float(value);
    if (type == DType::kFp16) reinterpret_cast<uint16_t*>(x.raw.get())[i] = sb::fp16_from_float(value);
    x.exact[i] = sb::load_as_float(x.raw.get(), type, i);
  }
  return x;
}

std::vector<float> run(const Implementation& impl, const Weight& w, const Activations& x, int tokens,
                       const sb::ThreadPool& pool) {
  Buffer bias = allocate(w.n * 4, 16), y = allocate(tokens * w.n * sb::element_bytes(x.type), 16);
  for (int64_t i = 0; i < w.n; ++i) reinterpret_cast<float*>(bias.get())[i] = static_cast<float>(i % 5);
  const un::LinearArgs args{x.raw.get(), x.type, tokens, bias.get(), DType::kFp32, y.get()};
  impl.run(impl.kernels, w.view, args, pool);
  std::vector<float> out(tokens * w.n);
  for (size_t i = 0; i < out.size(); ++i)
    out[i] = sb::load_as_float(y.get(), x.type, static_cast<int64_t>(i));
  return out;
}

// Returns the first token's results.
std::vector<float> check(const Implementation& impl, const Weight& w, DType x_type, std::mt19937& rng) {
  const int kTokens = w.k < 100 ? 300 : 70;  // more than the batched kernels take at once
  const Activations x = make_activations(kTokens, w.k, x_type, rng);
  const double rounding = x_type == DType::kBf16 ? 0x1p-8 : x_type == DType::kFp16 ? 0x1p-10 : 1e-6;
  // Activations of integer values are rounded to the largest / limit.
  const double step = un::is_integer(impl.values) ? 0.51 / un::activation_limit(w.view.header) : 0;
  std::vector<float> alone;
  for (const int tokens : {1, 2, 3, 5, 8, 9, 17, kTokens}) {
    sb::set_reads_one_stream(false);
    const auto one = run(impl, w, x, tokens, kOneThread);
    sb::set_reads_one_stream(true);
    if (one != run(impl, w, x, tokens, kOneThread)) fail("streams", impl.name.c_str(), w.n, w.k, tokens);
    if (one != run(impl, w, x, tokens, kThreads)) fail("threads", impl.name.c_str(), w.n, w.k, tokens);
    if (tokens == 1) alone = one;
    for (int64_t r = 0; r < w.n; ++r) {
      if (one[r] != alone[r]) return fail("depends on the batch", impl.name.c_str(), w.n, w.k, tokens), alone;
    }
    for (int t = 0; t < tokens; t += tokens > 9 ? 23 : 1) {
      double largest = 0;
      for (int64_t c = 0; c < w.k; ++c) largest = std::fmax(largest, std::fabs(x.exact[t * w.k + c]));
      for (int64_t r = 0; r < w.n; ++r) {
        double expected = static_cast<double>(r % 5), magnitude = expected, weights = 0;
        for (int64_t c = 0; c < w.k; ++c) {
          const double product = w.dense[r * w.k + c] * x.exact[t * w.k + c];
          expected += product;
          magnitude += std::fabs(product);
          weights += std::fabs(w.dense[r * w.k + c]);
        }
        const double allowed =
            rounding * std::fabs(expected) + 2e-6 * magnitude + step * largest * weights + 1e-30;
        const double got = one[t * w.n + r];
        if (x_type == DType::kFp16 && std::fabs(expected) > 6e4) continue;
        if (!(std::fabs(got - expected) <= allowed)) {
          return fail("value", impl.name.c_str(), w.n, w.k, tokens), alone;
        }
      }
    }
  }
  return alone;
}

// Any bytes as a header: parse() must refuse or accept, never read past the buffer.
void check_hostile_headers(const Implementation& impl, const Weight& w, std::mt19937& rng) {
  const int64_t bytes = w.view.header.total_bytes;
  Buffer copy = allocate(bytes);
  for (int i = 0; i < 2000; ++i) {
    std::memcpy(copy.get(), w.machine.get(), bytes);
    copy.get()[rng() % sizeof(un::Header)] ^= static_cast<uint8_t>(1U << (rng() % 8));
    un::View view;
    un::parse(copy.get(), i % 7 == 0 ? static_cast<int64_t>(rng() % bytes) : bytes, impl.stream->magic,
              impl.stream->rows_per_part, &view);
  }
}

template <class Kernels,
          void (*kLinear)(const Kernels&, const un::View&, const un::LinearArgs&, const sb::ThreadPool&)>
void run_with(const void* kernels, const un::View& w, const un::LinearArgs& args,
              const sb::ThreadPool& pool) {
  kLinear(*static_cast<const Kernels*>(kernels), w, args, pool);
}

std::vector<Implementation> implementations() {
  std::vector<Implementation> list;
  for (const Values v : {Values::kBf16, Values::kFp16, Values::kBf16x12, Values::kInt8, Values::kInt4}) {
    const std::string kind = " values " + std::to_string(static_cast<int>(v));
    // Their sums are moved into floats at the same columns; the scalar ones round twice, having no FMA.
    const auto integer_vectors = [&](const un::StripKernels& kernels) {
      return un::is_integer(v) && std::strcmp(kernels.name, "scalar") != 0;
    };
    const auto bitmask = [&](const bm::Kernels& kernels, bool bf16_only = false) {
      list.push_back({std::string("bitmask ") + kernels.name + kind,
                      &bm::kStream,
                      v,
                      bf16_only,
                      integer_vectors(kernels),
                      {0, 64, 128, 256},
                      run_with<un::StripKernels, un::strips_linear>,
                      &kernels});
    };
    const auto with_int8_activations = [&] {
      list.back().name += " int8 activations";
      list.back().int8_activations = true;
    };
    const auto bytes = [&] {
      bitmask(bm::avx512_byte_kernels(v));
      with_int8_activations();
    };
    const auto slices_by = [&](auto run, const auto& kernels, bool bf16_only) {
      list.push_back({std::string("sell ") + kernels.name + kind,
                      &sell::kStream,
                      v,
                      bf16_only,
                      !bf16_only,
                      {0, 128, 256},
                      run,
                      &kernels});
    };
    const auto slices = [&](const sell::Kernels& kernels, bool bf16_only = false) {
      slices_by(run_with<sell::Kernels, sell::linear_with>, kernels, bf16_only);
    };
    const auto slices_in_tiles = [&](const un::StripKernels& kernels, bool bf16_only) {
      slices_by(run_with<un::StripKernels, un::strips_linear>, kernels, bf16_only);
    };
    const auto blocks = [&](const lanes::Kernels& kernels, bool bf16_only = false) {
      list.push_back({std::string("lanes ") + kernels.name + kind,
                      &lanes::kStream,
                      v,
                      bf16_only,
                      integer_vectors(kernels),
                      {0, 32, 64, 128, 256},
                      run_with<un::StripKernels, un::strips_linear>,
                      &kernels});
    };
    const auto tiles = [&](bool integer_values) {
      bitmask(bm::amx_kernels(v), !integer_values);
      blocks(lanes::amx_kernels(v), !integer_values);
      slices_in_tiles(sell::amx_kernels(v), !integer_values);
      if (!integer_values) return;
      slices_in_tiles(sell::amx_byte_kernels(v), false);
      with_int8_activations();
      bitmask(bm::amx_byte_kernels(v));
      with_int8_activations();
      blocks(lanes::amx_byte_kernels(v));
      with_int8_activations();
    };
    [[maybe_unused]] const bool integer = un::is_integer(v);
    const bool bf16 = v == Values::kBf16 || v == Values::kBf16x12;
    bitmask(bm::scalar_kernels(v));
    slices(sell::scalar_kernels(v));
    blocks(lanes::scalar_kernels(v));
#if defined(SPARSE_BACKEND_EMULATE_AVX512)
    bitmask(bm::avx512_kernels(v));
    if (integer) bytes();
    if (bf16) bitmask(bm::avx512_bf16_kernels(v), true);
    slices(sell::avx512_kernels(v));
    if (bf16) slices(sell::avx512_bf16_kernels(v), true);
    blocks(lanes::avx512_kernels(v));
    if (bf16) blocks(lanes::avx512_bf16_kernels(v), true);
    if (bf16 || integer) tiles(integer);
#else
    if (sb::cpu_features().avx2) bitmask(bm::avx2_kernels(v)), slices(sell::avx2_kernels(v));
    if (sb::cpu_features().avx512) bitmask(bm::avx512_kernels(v)), slices(sell::avx512_kernels(v));
    if (sb::cpu_features().avx512_bf16 && bf16) slices(sell::avx512_bf16_kernels(v), true);
    if (sb::cpu_features().avx512 && integer) bytes();
    if (sb::cpu_features().avx2) blocks(lanes::avx2_kernels(v));
    if (sb::cpu_features().avx512) blocks(lanes::avx512_kernels(v));
    if (sb::cpu_features().avx512_bf16 && bf16) blocks(lanes::avx512_bf16_kernels(v), true);
    if (sb::cpu_features().avx512_bf16 && bf16) bitmask(bm::avx512_bf16_kernels(v), true);
    if (sb::best_isa() >= sb::Isa::kAmx && (bf16 || integer)) tiles(integer);
#endif
  }
  return list;
}

}  // namespace

int main() {
#if defined(SPARSE_BACKEND_EMULATE_AVX512)
  const int64_t shapes[][2] = {{3, 7}, {17, 257}, {65, 130}};  // emulation is slow
#else
  // The last two, once: several parts to a call of a kernel that takes 16 strips, 2 and 3 of sell's.
  const int64_t shapes[][2] = {{1, 1},    {3, 7},    {4, 64},   {17, 257},   {65, 130},
                               {70, 600}, {2, 4300}, {70, 192}, {1000, 257}, {1500, 130}};
#endif
  const auto list = implementations();
  for (const auto& shape : shapes) {
    for (const double zeros : {0.0, 0.5, 0.95, 1.0}) {
      // Of what is the same everywhere.
      std::map<std::tuple<const un::Stream*, Values, DType, int>, std::vector<float>> results;
      for (const Implementation& impl : list) {
        const bool once = shape[0] >= 1000;
        if (once && (zeros != 0.5 || impl.name.find(" amx ") == std::string::npos)) continue;
        const bool integer = un::is_integer(impl.values);
        const int group =
            integer ? impl.groups[static_cast<size_t>(shape[0] + shape[1]) % impl.groups.size()] : 0;
        for (const DType x_type : {DType::kBf16, DType::kFp16, DType::kFp32}) {
          if ((impl.bf16_only || once) && x_type != DType::kBf16) continue;
          // The same numbers for every implementation, so that they can be compared.
          std::mt19937 rng(7);
          const int activation_bits = impl.int8_activations || x_type == DType::kFp16 ? 8 : 16;
          const Weight w = make_weight(impl, shape[0], shape[1], zeros, group, activation_bits, rng);
          const auto result = check(impl, w, x_type, rng);
          if (impl.same_everywhere) {
            const std::tuple key(impl.stream, impl.values, x_type, activation_bits);
            const auto first = results.emplace(key, result).first;
            if (first->second != result) fail("depends on the machine", impl.name.c_str(), w.n, w.k, 1);
          }
          if (x_type == DType::kBf16) check_hostile_headers(impl, w, rng);
        }
      }
    }
  }
  test_lowbit();
#if !defined(SPARSE_BACKEND_EMULATE_AVX512)  // its kernels are one template for all levels
  test_layers();
#endif
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}

// What stands around projections, at every level this machine runs, on exactly-sized buffers: results
// against double arithmetic, and no byte read or written outside.
#include <cmath>
#include <random>

#include "cpu_features.h"
#include "layers/attention.h"
#include "layers/dense.h"
#include "layers/pointwise.h"
#include "support.h"

namespace la = sparse_backend::layers;
using sb::DType;

namespace {

constexpr DType kTypes[] = {DType::kBf16, DType::kFp16, DType::kFp32};

double tolerance(DType type) { return type == DType::kBf16 ? 0.01 : type == DType::kFp16 ? 2e-3 : 3e-5; }

struct Array {
  DType type;
  int64_t count;
  Buffer data;
  double at(int64_t i) const { return sb::load_as_float(data.get(), type, i); }
};

Array empty(DType type, int64_t count) {
  return {type, count, allocate(count * sb::element_bytes(type), 16)};
}

Array random_array(DType type, int64_t count, std::mt19937& rng) {
  Array a = empty(type, count);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < count; ++i) sb::store_float(a.data.get(), type, i, normal(rng));
  return a;
}

void compare(const char* what, const Array& got, const std::vector<double>& expected, double scale, int64_t n,
             int64_t k) {
  for (int64_t i = 0; i < got.count; ++i) {
    const double error = std::abs(got.at(i) - expected[i]);
    if (!(error <= tolerance(got.type) * (std::abs(expected[i]) + scale)))
      return fail(what, "", n, k, static_cast<int>(i));
  }
}

void test_dense(DType w_type, DType x_type, int64_t n, int64_t k, int tokens, std::mt19937& rng) {
  const Array w = random_array(w_type, n * k, rng), x = random_array(x_type, tokens * k, rng);
  const Array bias = random_array(DType::kFp32, n, rng), y = empty(x_type, tokens * n);
  la::DenseLinearArgs a{x.data.get(),    x_type,       tokens,      w.data.get(), w_type, n, k, k,
                        bias.data.get(), DType::kFp32, y.data.get()};
  la::dense_linear(a, kThreads);
  std::vector<double> expected(tokens * n);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t r = 0; r < n; ++r) {
      double sum = bias.at(r);
      for (int64_t i = 0; i < k; ++i) sum += w.at(r * k + i) * x.at(t * k + i);
      expected[t * n + r] = sum;
    }
  compare("dense", y, expected, std::sqrt(static_cast<double>(k)) * 0.1, n, k);
}

void test_attention(DType type, DType cache_type, int64_t head_dim, int64_t v_dim, int64_t window,
                    std::mt19937& rng) {
  constexpr int64_t kHeads = 6, kKvHeads = 2;
  const std::vector<int64_t> lengths{70, 1, 1100}, fresh{5, 1, 2}, rows{2, 0, 1};
  constexpr int64_t kTokens = 8, kRow = 1100;
  int64_t slots = 0;
  for (const int64_t length : lengths) slots += length;
  const Array q = random_array(type, kTokens * kHeads * head_dim, rng),
              out = empty(type, kTokens * kHeads * v_dim);
  const Array k = random_array(cache_type, slots * kKvHeads * head_dim, rng);
  const Array v = random_array(cache_type, slots * kKvHeads * v_dim, rng);
  Buffer table = allocate(3 * kRow * 4);
  auto* slot = reinterpret_cast<int32_t*>(table.get());
  int32_t next = static_cast<int32_t>(slots);
  for (int64_t i = 0; i < 3 * kRow; ++i) slot[i] = -1;
  for (size_t s = 0; s < rows.size(); ++s)
    for (int64_t p = 0; p < lengths[s]; ++p) slot[rows[s] * kRow + p] = --next;
  la::AttentionArgs a{};
  a.q = q.data.get();
  a.type = type;
  a.q_stride = kHeads * head_dim;
  a.heads = kHeads;
  a.kv_heads = kKvHeads;
  a.head_dim = static_cast<int>(head_dim);
  a.v_dim = static_cast<int>(v_dim);
  a.k_cache = k.data.get();
  a.v_cache = v.data.get();
  a.cache_type = cache_type;
  a.slots = slots;
  a.slot_table = slot;
  a.rows = 3;
  a.row_length = kRow;
  a.sequences = 3;
  a.row_of = rows.data();
  a.lengths = lengths.data();
  a.new_tokens = fresh.data();
  a.tokens = kTokens;
  a.scale = 0.2F;
  a.window = window;
  a.causal = true;
  a.out = out.data.get();
  if (la::attention(a, kThreads) != nullptr) return fail("attention refuses", "", head_dim, v_dim, 0);
  std::vector<double> expected(kTokens * kHeads * v_dim);
  int64_t token = 0;
  for (size_t s = 0; s < rows.size(); ++s)
    for (int64_t t = 0; t < fresh[s]; ++t, ++token)
      for (int64_t h = 0; h < kHeads; ++h) {
        const int64_t own = lengths[s] - fresh[s] + t, head = h / (kHeads / kKvHeads);
        double total = 0;
        double* y = expected.data() + (token * kHeads + h) * v_dim;
        for (int64_t p = window >= 0 && own > window ? own - window : 0; p <= own; ++p) {
          const int64_t at = slot[rows[s] * kRow + p] * kKvHeads + head;
          double score = 0;
          for (int64_t d = 0; d < head_dim; ++d)
            score += q.at((token * kHeads + h) * head_dim + d) * k.at(at * head_dim + d);
          const double weight = std::exp(score * 0.2);
          total += weight;
          for (int64_t d = 0; d < v_dim; ++d) y[d] += weight * v.at(at * v_dim + d);
        }
        for (int64_t d = 0; d < v_dim; ++d) y[d] /= total;
      }
  compare("attention", out, expected, 0.1, head_dim, v_dim);
  slot[rows[2] * kRow + 1099] = static_cast<int32_t>(slots);
  if (la::attention(a, kThreads) == nullptr)
    fail("attention takes a slot that is not there", "", head_dim, v_dim, 0);
}

void test_pointwise(DType type, DType weight_type, int64_t size, std::mt19937& rng) {
  constexpr int64_t kTokens = 3;
  const Array x = random_array(type, kTokens * size, rng), residual = random_array(type, kTokens * size, rng);
  const Array weight = random_array(weight_type, size, rng);
  const Array y = empty(type, kTokens * size), sum = empty(type, kTokens * size);
  la::RmsNormArgs n{x.data.get(), type,  kTokens,       size,         residual.data.get(), weight.data.get(),
                    weight_type,  1e-6F, size % 2 == 0, y.data.get(), sum.data.get()};
  la::rms_norm(n, kThreads);
  std::vector<double> expected(kTokens * size), sums(kTokens * size);
  for (int64_t t = 0; t < kTokens; ++t) {
    double squares = 0;
    for (int64_t i = t * size; i < (t + 1) * size; ++i) {
      sums[i] = x.at(i) + residual.at(i);
      squares += sums[i] * sums[i];
    }
    for (int64_t i = t * size; i < (t + 1) * size; ++i)
      expected[i] = sums[i] / std::sqrt(squares / static_cast<double>(size) + 1e-6) * weight.at(i - t * size);
  }
  compare("norm's sum", sum, sums, 0.01, size, 0);
  compare("norm", y, expected, 0.01, size, 0);

  const Array gates = random_array(type, 2 * kTokens * size, rng), gated = empty(type, kTokens * size);
  la::silu_and_mul(gates.data.get(), type, kTokens, size, gated.data.get(), kThreads);
  for (int64_t t = 0; t < kTokens; ++t)
    for (int64_t i = 0; i < size; ++i) {
      const double gate = gates.at(2 * t * size + i);
      expected[t * size + i] = gate / (1 + std::exp(-gate)) * gates.at((2 * t + 1) * size + i);
    }
  compare("silu", gated, expected, 0.01, size, 0);

  const int64_t head_dim = size + 3;
  const int rotary = static_cast<int>(size / 2 * 2);
  if (rotary == 0) return;
  for (const bool halves : {false, true}) {
    const Array heads = random_array(type, kTokens * 2 * head_dim, rng);
    const Array angles = random_array(DType::kFp32, 4 * rotary, rng);
    const std::vector<int64_t> positions{3, 0, 2};
    std::vector<double> turned(heads.count);
    for (int64_t i = 0; i < heads.count; ++i) turned[i] = heads.at(i);
    for (int64_t t = 0; t < kTokens; ++t)
      for (int64_t h = 0; h < 2; ++h)
        for (int64_t i = 0; i < rotary / 2; ++i) {
          const int64_t head = (t * 2 + h) * head_dim;
          const int64_t a = head + (halves ? i : 2 * i), b = head + (halves ? rotary / 2 + i : 2 * i + 1);
          const double cos = angles.at(positions[t] * rotary + i),
                       sin = angles.at(positions[t] * rotary + rotary / 2 + i);
          turned[a] = heads.at(a) * cos - heads.at(b) * sin;
          turned[b] = heads.at(b) * cos + heads.at(a) * sin;
        }
    la::RotaryArgs r{heads.data.get(),
                     type,
                     kTokens,
                     2 * head_dim,
                     2,
                     head_dim,
                     rotary,
                     positions.data(),
                     reinterpret_cast<const float*>(angles.data.get()),
                     halves};
    la::rotary_embedding(r, kThreads);
    compare("rotary", heads, turned, 0.1, size, halves);
  }
}

}  // namespace

void test_layers() {
  const sb::Isa before = sb::active_isa();
  for (int level = 0; level <= static_cast<int>(sb::best_isa()); ++level) {
    sb::set_isa(static_cast<sb::Isa>(level));
    std::mt19937 rng(5);
    for (const DType type : kTypes) {
      for (const DType other : kTypes) {
        for (const int64_t size : {1, 7, 16, 40, 257}) test_pointwise(type, other, size, rng);
        for (const int tokens : {1, 5}) {
          test_dense(other, type, 1, 1, tokens, rng);
          test_dense(other, type, 35, 70, tokens, rng);
          test_dense(other, type, 4, 2100, tokens, rng);
        }
        test_attention(type, other, 7, 5, -1, rng);
        test_attention(type, other, 64, 64, 100, rng);
        test_attention(type, other, 24, 40, 3, rng);
      }
    }
  }
  sb::set_isa(before);
}

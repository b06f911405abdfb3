// The ops of what stands around projections: attention, dense products, norms, rotary embedding, gates.
#include <optional>
#include <tuple>
#include <vector>

#include "layers/attention.h"
#include "layers/dense.h"
#include "layers/pointwise.h"
#include "torch_common.h"

namespace {

using namespace sparse_backend::layers;

const int64_t* int64_data(const Tensor& t, int64_t count, const char* what) {
  STD_TORCH_CHECK(
      t.scalar_type() == ScalarType::Long && t.dim() == 1 && t.is_contiguous() && t.size(0) == count, what,
      " must be a contiguous int64 tensor [", count, "]");
  return static_cast<const int64_t*>(t.const_data_ptr());
}

// Softmax(scale * q K^T) V for new tokens [T, H, D] of several sequences, in order, over a paged cache.
Tensor paged_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                       const Tensor& slot_table, const Tensor& rows, const Tensor& lengths,
                       const std::optional<Tensor>& new_tokens, double scale, int64_t window,
                       double logit_cap, bool causal) {
  STD_TORCH_CHECK(q.dim() == 3 && q.stride(2) == 1 && q.stride(1) == q.size(2),
                  "q must be [tokens, heads, head_dim] with contiguous tokens");
  STD_TORCH_CHECK(k_cache.dim() == 3 && v_cache.dim() == 3 && k_cache.is_contiguous() &&
                      v_cache.is_contiguous() && k_cache.size(0) == v_cache.size(0) &&
                      k_cache.size(1) == v_cache.size(1),
                  "caches must be contiguous, [slots, kv_heads, head_dim] and [slots, kv_heads, v_dim]");
  AttentionArgs a{};
  a.type = dtype_of(q, "q");
  a.cache_type = dtype_of(k_cache, "k_cache");
  STD_TORCH_CHECK(dtype_of(v_cache, "v_cache") == a.cache_type, "both caches must have the same dtype");
  a.heads = q.size(1);
  a.kv_heads = k_cache.size(1);
  STD_TORCH_CHECK(a.kv_heads > 0 && a.heads % a.kv_heads == 0, "there are ", a.heads, " query heads for ",
                  a.kv_heads, " of the cache");
  STD_TORCH_CHECK(q.size(2) == k_cache.size(2) && q.size(2) > 0, "head_dim is ", q.size(2), " of q and ",
                  k_cache.size(2), " of k_cache");
  STD_TORCH_CHECK(
      slot_table.scalar_type() == ScalarType::Int && slot_table.dim() == 2 && slot_table.is_contiguous(),
      "slot_table must be a contiguous int32 tensor [rows, positions]");
  a.head_dim = static_cast<int>(q.size(2));
  a.v_dim = static_cast<int>(v_cache.size(2));
  a.q_stride = q.stride(0);
  a.slots = k_cache.size(0);
  a.rows = slot_table.size(0);
  a.row_length = slot_table.size(1);
  a.sequences = rows.dim() == 1 ? rows.size(0) : 0;
  a.row_of = int64_data(rows, a.sequences, "rows");
  a.lengths = int64_data(lengths, a.sequences, "lengths");
  if (new_tokens.has_value()) a.new_tokens = int64_data(*new_tokens, a.sequences, "new_tokens");
  a.tokens = q.size(0);
  a.scale = static_cast<float>(scale);
  a.window = window;
  a.logit_cap = static_cast<float>(logit_cap);
  a.causal = causal;
  Tensor out = torch::stable::new_empty(q, {a.tokens, a.heads, v_cache.size(2)});
  a.q = q.const_data_ptr();
  a.k_cache = k_cache.const_data_ptr();
  a.v_cache = v_cache.const_data_ptr();
  a.slot_table = static_cast<const int32_t*>(slot_table.const_data_ptr());
  a.out = out.mutable_data_ptr();
  const char* problem = attention(a, torch_pool());
  STD_TORCH_CHECK(problem == nullptr, problem);
  return out;
}

std::vector<int64_t> shape_of(const Tensor& x, int64_t last) {
  std::vector<int64_t> shape;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) shape.push_back(x.size(d));
  shape.push_back(last);
  return shape;
}

// y [..., N] = x [..., K] W^T + bias
Tensor dense(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.stride(1) == 1, "weight must be [N, K] with contiguous rows");
  const int64_t n = weight.size(0), k = weight.size(1);
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == k,
                  "the last dimension of x must be in_features = ", k);
  const Tensor input = torch::stable::contiguous(x);
  Tensor y = torch::stable::new_empty(x, shape_of(x, n));
  if (y.numel() == 0) return y;
  DenseLinearArgs a{};
  a.x = input.const_data_ptr();
  a.x_type = dtype_of(x, "x");
  a.tokens = y.numel() / n;
  a.w = weight.const_data_ptr();
  a.w_type = dtype_of(weight, "weight");
  a.out_features = n;
  a.in_features = k;
  a.w_stride = weight.stride(0);
  Tensor kept;
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == n, "bias must have shape [", n, "]");
    kept = torch::stable::contiguous(*bias);
    a.bias = kept.const_data_ptr();
    a.bias_type = dtype_of(kept, "bias");
  }
  a.y = y.mutable_data_ptr();
  dense_linear(a, torch_pool());
  return y;
}

struct Normed {
  Tensor y, sum;
};

Normed norm(const Tensor& x, const Tensor* residual, const Tensor& weight, double eps,
            bool round_before_weight) {
  STD_TORCH_CHECK(
      x.dim() >= 1 && weight.dim() == 1 && weight.is_contiguous() && x.size(x.dim() - 1) == weight.size(0),
      "weight must be contiguous, [", x.dim() >= 1 ? x.size(x.dim() - 1) : 0, "]");
  const Tensor input = torch::stable::contiguous(x);
  Normed out{torch::stable::new_empty(x, shape_of(x, weight.size(0))), Tensor()};
  RmsNormArgs a{};
  a.type = dtype_of(x, "x");
  a.weight_type = dtype_of(weight, "weight");
  a.size = weight.size(0);
  Tensor kept;
  if (residual != nullptr) {
    STD_TORCH_CHECK(residual->numel() == x.numel() && residual->scalar_type() == x.scalar_type(),
                    "residual must have the shape and dtype of x");
    kept = torch::stable::contiguous(*residual);
    out.sum = torch::stable::new_empty(x, shape_of(x, weight.size(0)));
    a.residual = kept.const_data_ptr();
    a.sum = out.sum.mutable_data_ptr();
  }
  if (x.numel() == 0) return out;
  a.x = input.const_data_ptr();
  a.tokens = x.numel() / a.size;
  a.weight = weight.const_data_ptr();
  a.eps = static_cast<float>(eps);
  a.round_before_weight = round_before_weight;
  a.y = out.y.mutable_data_ptr();
  rms_norm(a, torch_pool());
  return out;
}

Tensor rms_norm_op(const Tensor& x, const Tensor& weight, double eps, bool round_before_weight) {
  return norm(x, nullptr, weight, eps, round_before_weight).y;
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                        double eps, bool round_before_weight) {
  Normed out = norm(x, &residual, weight, eps, round_before_weight);
  return {out.y, out.sum};
}

// Rotates the heads of x [T, heads * head_dim] in place.
void rotate(Tensor x, const Tensor& positions, const Tensor& cos_sin, int64_t head_dim, bool halves) {
  STD_TORCH_CHECK(x.dim() == 2 && x.stride(1) == 1 && head_dim > 0 && x.size(1) % head_dim == 0,
                  "x must be [tokens, heads * head_dim] with contiguous tokens");
  STD_TORCH_CHECK(cos_sin.scalar_type() == ScalarType::Float && cos_sin.dim() == 2 &&
                      cos_sin.is_contiguous() && cos_sin.size(1) % 2 == 0 && cos_sin.size(1) <= head_dim,
                  "cos_sin must be a contiguous float32 tensor [positions, at most head_dim]");
  RotaryArgs a{};
  a.positions = int64_data(positions, x.size(0), "positions");
  for (int64_t t = 0; t < x.size(0); ++t)
    STD_TORCH_CHECK(a.positions[t] >= 0 && a.positions[t] < cos_sin.size(0), "position ", a.positions[t],
                    " is outside cos_sin");
  a.x = x.mutable_data_ptr();
  a.type = dtype_of(x, "x");
  a.tokens = x.size(0);
  a.stride = x.stride(0);
  a.heads = x.size(1) / head_dim;
  a.head_dim = head_dim;
  a.rotary_dim = static_cast<int>(cos_sin.size(1));
  a.cos_sin = static_cast<const float*>(cos_sin.const_data_ptr());
  a.halves = halves;
  rotary_embedding(a, torch_pool());
}

Tensor silu_and_mul_op(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) % 2 == 0, "the last dimension of x must be even");
  const int64_t size = x.size(x.dim() - 1) / 2;
  const Tensor input = torch::stable::contiguous(x);
  Tensor out = torch::stable::new_empty(x, shape_of(x, size));
  if (out.numel() > 0)
    silu_and_mul(input.const_data_ptr(), dtype_of(x, "x"), out.numel() / size, size, out.mutable_data_ptr(),
                 torch_pool());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparse_backend, m) {
  m.def(
      "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor slot_table, Tensor rows, Tensor "
      "lengths, "
      "Tensor? new_tokens, float scale, int window, float logit_cap, bool causal) -> Tensor");
  m.def("dense_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, float eps, bool round_before_weight) -> Tensor");
  m.def(
      "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, bool round_before_weight) -> "
      "(Tensor y, Tensor sum)");
  m.def("rotary_embedding_(Tensor(a!) x, Tensor positions, Tensor cos_sin, int head_dim, bool halves) -> ()");
  m.def("silu_and_mul(Tensor x) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sparse_backend, CPU, m) {
  m.impl("paged_attention", TORCH_BOX(&paged_attention));
  m.impl("dense_linear", TORCH_BOX(&dense));
  m.impl("rms_norm", TORCH_BOX(&rms_norm_op));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("rotary_embedding_", TORCH_BOX(&rotate));
  m.impl("silu_and_mul", TORCH_BOX(&silu_and_mul_op));
}

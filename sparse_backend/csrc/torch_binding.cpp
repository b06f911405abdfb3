// The only file that sees torch, and only its stable ABI: one build serves every torch from
// 2.10. Checks arguments, allocates outputs, hands plain pointers to the kernels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>
#include <vector>

#include "bitmask/linear.h"
#include "bitmask/pack.h"
#include "cpu_features.h"
#include "huge_pages.h"

namespace {

using sparse_backend::DType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

sparse_backend::ThreadPool torch_pool() {
  const auto run = [](int64_t count, void (*task)(int64_t, void*), void* context) {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) task(i, context);
    });
  };
  return {static_cast<int>(torch::stable::get_num_threads()), run};
}

DType dtype_of(const Tensor& t, const char* what) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16:
      return DType::kBf16;
    case ScalarType::Half:
      return DType::kFp16;
    case ScalarType::Float:
      return DType::kFp32;
    default:
      STD_TORCH_CHECK(false, what, " must be bfloat16, float16 or float32");
  }
  return DType::kFp32;
}

void check_bytes(const Tensor& t, int64_t dim, const char* what) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Byte && t.dim() == dim && t.is_contiguous(), what,
                  " must be a contiguous uint8 tensor of ", dim, " dimension(s)");
}

std::tuple<Tensor, Tensor> bitmask_pack(const Tensor& weight) {
  using namespace sparse_backend::bitmask;
  STD_TORCH_CHECK(weight.dim() == 2, "weight must have two dimensions [N, K], got ", weight.dim());
  const DType type = dtype_of(weight, "weight");
  STD_TORCH_CHECK(type != DType::kFp32, "weight must be bfloat16 or float16");
  const Tensor dense = torch::stable::contiguous(weight);
  const int64_t n = dense.size(0), k = dense.size(1);
  const auto pool = torch_pool();
  const auto* data = static_cast<const uint16_t*>(dense.const_data_ptr());

  Tensor mask = torch::stable::new_empty(dense, {n, mask_stride(k)}, ScalarType::Byte);
  std::vector<int64_t> start(n + 1, 0);
  const int64_t bad =
      pack_mask(data, type, n, k, static_cast<uint8_t*>(mask.mutable_data_ptr()), start.data() + 1, pool);
  STD_TORCH_CHECK(bad == 0, "weight has ", bad, " NaN or infinite value(s)");
  for (int64_t i = 0; i < n; ++i) start[i + 1] += start[i];
  Tensor values = torch::stable::new_empty(dense, {start[n]});
  pack_values(data, n, k, start.data(), static_cast<uint16_t*>(values.mutable_data_ptr()), pool);
  return {mask, values};
}

// Checks that mask and values are one canonical form; returns where each row's values start.
sparse_backend::bitmask::Canonical canonical(const Tensor& mask, const Tensor& values, int64_t in_features,
                                             std::vector<int64_t>& start) {
  using namespace sparse_backend::bitmask;
  check_bytes(mask, 2, "mask");
  const DType type = dtype_of(values, "values");
  STD_TORCH_CHECK(type != DType::kFp32 && values.dim() == 1 && values.is_contiguous(),
                  "values must be a contiguous bfloat16 or float16 tensor of 1 dimension");
  STD_TORCH_CHECK(in_features >= 0 && mask.size(1) == mask_stride(in_features), "mask has ", mask.size(1),
                  " bytes per row, in_features = ", in_features, " needs ", mask_stride(in_features));
  const int64_t n = mask.size(0);
  start.resize(n + 1);
  const auto* mask_data = static_cast<const uint8_t*>(mask.const_data_ptr());
  const bool clean = row_starts(mask_data, n, in_features, start.data(), torch_pool());
  STD_TORCH_CHECK(clean, "mask has bits set past column ", in_features);
  STD_TORCH_CHECK(start[n] == values.numel(), "mask has ", start[n], " bits set, but there are ",
                  values.numel(), " values");
  return {n, in_features, type, mask_data, static_cast<const uint16_t*>(values.const_data_ptr()), start[n]};
}

Tensor bitmask_unpack(const Tensor& mask, const Tensor& values, int64_t in_features) {
  std::vector<int64_t> start;
  const auto weight = canonical(mask, values, in_features, start);
  Tensor dense = torch::stable::new_empty(values, {weight.out_features, in_features});
  sparse_backend::bitmask::unpack(weight, start.data(), static_cast<uint16_t*>(dense.mutable_data_ptr()),
                                  torch_pool());
  return dense;
}

Tensor bitmask_lower(const Tensor& mask, const Tensor& values, int64_t in_features) {
  using namespace sparse_backend::bitmask;
  std::vector<int64_t> start;
  const auto weight = canonical(mask, values, in_features, start);
  const int64_t bytes = machine_bytes(weight.out_features, in_features, weight.nnz);
  Tensor packed = torch::stable::new_empty(mask, {bytes});
  auto* buffer = static_cast<uint8_t*>(packed.mutable_data_ptr());
  sparse_backend::advise_huge_pages(buffer, bytes);
  lower(weight, start.data(), buffer, torch_pool());
  return packed;
}

Tensor bitmask_linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
                      int64_t out_features) {
  using namespace sparse_backend::bitmask;
  check_bytes(packed, 1, "packed weight");
  const DType x_type = dtype_of(x, "x");
  View weight;
  const char* problem = parse(static_cast<const uint8_t*>(packed.const_data_ptr()), packed.numel(), &weight);
  STD_TORCH_CHECK(problem == nullptr, problem);
  const int64_t n = weight.header.out_features, k = weight.header.in_features;
  STD_TORCH_CHECK(n == out_features, "packed weight has ", n, " output features, not ", out_features);
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == k,
                  "the last dimension of x must be in_features = ", k);

  std::vector<int64_t> shape;
  int64_t tokens = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) {
    shape.push_back(x.size(d));
    tokens *= x.size(d);
  }
  shape.push_back(n);
  Tensor y = torch::stable::new_empty(x, shape);
  if (y.numel() == 0) return y;

  const Tensor dense_x = x.is_contiguous() ? x : torch::stable::contiguous(x);
  LinearArgs args{dense_x.const_data_ptr(), x_type, tokens, nullptr, DType::kFp32, y.mutable_data_ptr()};
  Tensor dense_bias;
  if (bias.has_value()) {
    args.bias_type = dtype_of(*bias, "bias");
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == n, "bias must have shape [", n, "]");
    dense_bias = bias->is_contiguous() ? *bias : torch::stable::contiguous(*bias);
    args.bias = dense_bias.const_data_ptr();
  }
  linear(weight, args, torch_pool());
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparse_backend, m) {
  m.def("bitmask_pack(Tensor weight) -> (Tensor mask, Tensor values)");
  m.def("bitmask_unpack(Tensor mask, Tensor values, int in_features) -> Tensor");
  m.def("bitmask_lower(Tensor mask, Tensor values, int in_features) -> Tensor");
  m.def("bitmask_linear(Tensor x, Tensor packed, Tensor? bias, int out_features) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sparse_backend, CPU, m) {
  m.impl("bitmask_pack", TORCH_BOX(&bitmask_pack));
  m.impl("bitmask_unpack", TORCH_BOX(&bitmask_unpack));
  m.impl("bitmask_lower", TORCH_BOX(&bitmask_lower));
  m.impl("bitmask_linear", TORCH_BOX(&bitmask_linear));
}

// Plain C, for ctypes: asked before any tensor exists.
extern "C" {

__attribute__((visibility("default"))) int sparse_backend_best_isa() {
  return static_cast<int>(sparse_backend::best_isa());
}

__attribute__((visibility("default"))) int sparse_backend_active_isa() {
  return static_cast<int>(sparse_backend::active_isa());
}

__attribute__((visibility("default"))) int sparse_backend_set_isa(int isa) {
  return sparse_backend::set_isa(static_cast<sparse_backend::Isa>(isa)) ? 1 : 0;
}

// One bit per member of CpuFeatures, in its order.
__attribute__((visibility("default"))) int sparse_backend_cpu_features() {
  const auto& f = sparse_backend::cpu_features();
  const bool members[] = {f.avx2, f.avx512, f.avx512_bf16, f.avx512_vnni, f.avx_vnni, f.amx_bf16, f.amx_int8};
  int bits = 0, index = 0;
  for (const bool member : members) bits |= static_cast<int>(member) << index++;
  return bits;
}

__attribute__((visibility("default"))) const char* sparse_backend_bitmask_kernel(int value_type, int x_type) {
  return sparse_backend::bitmask::kernel_name(static_cast<DType>(value_type), static_cast<DType>(x_type));
}

}  // extern "C"

// The ops of ternary and int8 weights (see torch_common.h): checks arguments, allocates outputs, hands
// plain pointers to the kernels.
#include <optional>
#include <tuple>

#include "huge_pages.h"
#include "lowbit/linear.h"
#include "lowbit/pack.h"
#include "torch_common.h"

namespace {

void check_int8(const Tensor& t, const char* what) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Char && t.dim() == 2 && t.is_contiguous(), what,
                  " must be a contiguous int8 tensor [N, K]");
}

void check_per_byte(int64_t per_byte) {
  STD_TORCH_CHECK(per_byte == 4 || per_byte == 5, "codes per byte must be 4 or 5, got ", per_byte);
}

// (whether the weight is ternary, its codes, its scales [N, groups]); group_size 0: one group per row.
std::tuple<bool, Tensor, Tensor> ternary_scan(const Tensor& weight, int64_t group_size) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight must have two dimensions [N, K], got ", weight.dim());
  const DType type = dtype_of(weight, "weight");
  const Tensor dense = torch::stable::contiguous(weight);
  const int64_t n = dense.size(0), k = dense.size(1);
  const int64_t group = group_size > 0 && group_size < k ? group_size : (k > 0 ? k : 1);
  Tensor codes = torch::stable::new_empty(dense, {n, k}, ScalarType::Char);
  Tensor scales = torch::stable::new_empty(dense, {n, (k + group - 1) / group});
  const bool ternary = sparse_backend::lowbit::scan_ternary(dense.const_data_ptr(), type, n, k, group,
                                                            static_cast<int8_t*>(codes.mutable_data_ptr()),
                                                            scales.mutable_data_ptr(), torch_pool());
  return {ternary, codes, scales};
}

Tensor ternary_encode(const Tensor& codes, int64_t per_byte) {
  using namespace sparse_backend::lowbit;
  check_int8(codes, "codes");
  check_per_byte(per_byte);
  const int64_t n = codes.size(0), k = codes.size(1);
  Tensor out =
      torch::stable::new_empty(codes, {n, canonical_stride(k, static_cast<int>(per_byte))}, ScalarType::Byte);
  const int64_t bad =
      encode(static_cast<const int8_t*>(codes.const_data_ptr()), n, k, static_cast<int>(per_byte),
             static_cast<uint8_t*>(out.mutable_data_ptr()), torch_pool());
  STD_TORCH_CHECK(bad == 0, bad, " code(s) are not -1, 0 or 1");
  return out;
}

Tensor ternary_decode(const Tensor& packed, int64_t per_byte, int64_t in_features) {
  using namespace sparse_backend::lowbit;
  check_bytes(packed, 2, "codes");
  check_per_byte(per_byte);
  const int64_t stride = in_features < 0 ? -1 : canonical_stride(in_features, static_cast<int>(per_byte));
  STD_TORCH_CHECK(packed.size(1) == stride, "codes have ", packed.size(1),
                  " bytes per row, in_features = ", in_features, " needs ", stride);
  Tensor out = torch::stable::new_empty(packed, {packed.size(0), in_features}, ScalarType::Char);
  const int64_t bad =
      decode(static_cast<const uint8_t*>(packed.const_data_ptr()), packed.size(0), in_features,
             static_cast<int>(per_byte), static_cast<int8_t*>(out.mutable_data_ptr()), torch_pool());
  STD_TORCH_CHECK(bad == 0, bad, " byte(s) hold codes that do not exist (",
                  per_byte == 4 ? "3 in two bits" : "243 to 255 for five trits",
                  ", or set past the last column)");
  return out;
}

// Machine form of int8 weights [N, K]: per_byte 4 or 5 for ternary codes, 1 for int8.
Tensor lowbit_lower(const Tensor& weights, int64_t per_byte, int64_t group_size, int64_t limbs) {
  using namespace sparse_backend::lowbit;
  check_int8(weights, "weights");
  Header header{kMagic,          static_cast<Storage>(per_byte),   weights.size(0),
                weights.size(1), static_cast<int32_t>(group_size), static_cast<int32_t>(limbs)};
  STD_TORCH_CHECK(header.in_features <= kMaxColumns, "low-bit kernels sum up to ", kMaxColumns,
                  " columns in 32 bits, this weight has ", header.in_features);
  STD_TORCH_CHECK(per_byte == 1 || per_byte == 4 || per_byte == 5, "weights per byte must be 1, 4 or 5");
  STD_TORCH_CHECK(
      group_size == 0 || (group_size >= 32 && group_size <= 256 && (group_size & (group_size - 1)) == 0),
      "group_size must be 0, 32, 64, 128 or 256, got ", group_size);
  STD_TORCH_CHECK(
      limbs >= 1 && limbs <= 3 && (per_byte == 1) == (limbs == 2) && !(per_byte == 1 && group_size > 0),
      "int8 weights take 2 limbs and no groups, ternary ones 1 or 3 limbs");
  const int64_t bytes =
      machine_bytes(make_plan(header.storage, header.in_features, group_size), header.out_features);
  Tensor packed = torch::stable::new_empty(weights, {bytes}, ScalarType::Byte);
  auto* buffer = static_cast<uint8_t*>(packed.mutable_data_ptr());
  sparse_backend::advise_huge_pages(buffer, bytes);
  const int64_t bad =
      lower(static_cast<const int8_t*>(weights.const_data_ptr()), header, buffer, torch_pool());
  STD_TORCH_CHECK(bad == 0, bad, " row(s) hold weights out of range");
  return packed;
}

Tensor lowbit_linear(const Tensor& x, const Tensor& packed, const Tensor& scales,
                     const std::optional<Tensor>& bias, int64_t out_features,
                     const std::optional<Tensor>& absmax) {
  using namespace sparse_backend::lowbit;
  check_bytes(packed, 1, "packed weight");
  LinearArgs args{};
  const auto* data = static_cast<const uint8_t*>(packed.const_data_ptr());
  const char* problem = parse(data, packed.numel(), &args.header);
  STD_TORCH_CHECK(problem == nullptr, problem);
  const int64_t n = args.header.out_features, k = args.header.in_features, group = args.header.group_size;
  args.scale_type = dtype_of(scales, "scales");
  args.one_scale = scales.dim() == 1;
  const int64_t groups = group > 0 ? (k + group - 1) / group : 1;
  STD_TORCH_CHECK(scales.is_contiguous() &&
                      (args.one_scale ? scales.size(0) == 1 && group == 0
                                      : scales.dim() == 2 && scales.size(0) == groups && scales.size(1) == n),
                  "scales must be contiguous, [1] or [", groups, ", ", n, "]");
  LinearTensors t = linear_tensors(x, bias, n, k, out_features);
  if (t.y.numel() == 0) return t.y;
  if (absmax.has_value()) {
    STD_TORCH_CHECK(
        absmax->scalar_type() == ScalarType::Float && absmax->is_contiguous() && absmax->numel() == t.tokens,
        "absmax must be a contiguous float32 tensor with one value per token");
    args.absmax = static_cast<const float*>(absmax->const_data_ptr());
  }
  args.panels = data + kHeaderBytes;
  args.scales = scales.const_data_ptr();
  args.x = t.x.const_data_ptr();
  args.x_type = t.x_type;
  args.tokens = t.tokens;
  args.bias = t.bias_data;
  args.bias_type = t.bias_type;
  args.y = t.y.mutable_data_ptr();
  linear(args, torch_pool());
  return t.y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparse_backend, m) {
  m.def("ternary_scan(Tensor weight, int group_size) -> (bool ternary, Tensor codes, Tensor scales)");
  m.def("ternary_encode(Tensor codes, int per_byte) -> Tensor");
  m.def("ternary_decode(Tensor packed, int per_byte, int in_features) -> Tensor");
  m.def("lowbit_lower(Tensor weights, int per_byte, int group_size, int limbs) -> Tensor");
  m.def(
      "lowbit_linear(Tensor x, Tensor packed, Tensor scales, Tensor? bias, int out_features, "
      "Tensor? absmax=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sparse_backend, CPU, m) {
  m.impl("ternary_scan", TORCH_BOX(&ternary_scan));
  m.impl("ternary_encode", TORCH_BOX(&ternary_encode));
  m.impl("ternary_decode", TORCH_BOX(&ternary_decode));
  m.impl("lowbit_lower", TORCH_BOX(&lowbit_lower));
  m.impl("lowbit_linear", TORCH_BOX(&lowbit_linear));
}

extern "C" {

__attribute__((visibility("default"))) const char* sparse_backend_lowbit_kernel() {
  return sparse_backend::lowbit::kernel_name();
}

}  // extern "C"

// The ops of packed weights (see torch_common.h): checks arguments, allocates outputs, hands plain
// pointers to the kernels.
#include <optional>
#include <tuple>
#include <vector>

#include "bitmask/linear.h"
#include "bitmask/pack.h"
#include "cpu_features.h"
#include "huge_pages.h"
#include "lanes/bf16x12.h"
#include "lanes/linear.h"
#include "lanes/pack.h"
#include "lowbit/linear.h"
#include "lowbit/pack.h"
#include "sell/linear.h"
#include "sell/pack.h"
#include "torch_common.h"

namespace {

void check_bytes(const Tensor& t, int64_t dim, const char* what) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Byte && t.dim() == dim && t.is_contiguous(), what,
                  " must be a contiguous uint8 tensor of ", dim, " dimension(s)");
}

int64_t count_nonzero(const Tensor& weight) {
  STD_TORCH_CHECK(weight.is_contiguous() && dtype_of(weight, "weight") != DType::kFp32,
                  "weight must be contiguous, bfloat16 or float16");
  return sparse_backend::bitmask::count_nonzero(static_cast<const uint16_t*>(weight.const_data_ptr()),
                                                weight.numel(), torch_pool());
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
sparse_backend::unstructured::Canonical canonical(const Tensor& mask, const Tensor& values,
                                                  int64_t in_features, std::vector<int64_t>& start) {
  using namespace sparse_backend::unstructured;
  check_bytes(mask, 2, "mask");
  STD_TORCH_CHECK(values.dim() == 1 && values.is_contiguous(), "values must be contiguous, of 1 dimension");
  Values kind = Values::kInt8;
  if (values.scalar_type() != ScalarType::Char) {
    const DType type = dtype_of(values, "values");
    STD_TORCH_CHECK(type != DType::kFp32, "values must be bfloat16, float16 or int8");
    kind = type == DType::kBf16 ? Values::kBf16 : Values::kFp16;
  }
  STD_TORCH_CHECK(in_features >= 0 && mask.size(1) == mask_stride(in_features), "mask has ", mask.size(1),
                  " bytes per row, in_features = ", in_features, " needs ", mask_stride(in_features));
  const int64_t n = mask.size(0);
  start.resize(n + 1);
  const auto* mask_data = static_cast<const uint8_t*>(mask.const_data_ptr());
  const bool clean = row_starts(mask_data, n, in_features, start.data(), torch_pool());
  STD_TORCH_CHECK(clean, "mask has bits set past column ", in_features);
  STD_TORCH_CHECK(start[n] == values.numel(), "mask has ", start[n], " bits set, but there are ",
                  values.numel(), " values");
  return {n, in_features, kind, mask_data, values.const_data_ptr(), start[n]};
}

Tensor bitmask_unpack(const Tensor& mask, const Tensor& values, int64_t in_features) {
  std::vector<int64_t> start;
  const auto weight = canonical(mask, values, in_features, start);
  STD_TORCH_CHECK(!sparse_backend::unstructured::is_integer(weight.values),
                  "values must be bfloat16 or float16");
  Tensor dense = torch::stable::new_empty(values, {weight.out_features, in_features});
  sparse_backend::bitmask::unpack(weight, start.data(), static_cast<uint16_t*>(dense.mutable_data_ptr()),
                                  torch_pool());
  return dense;
}

// Machine form of an unstructured format. `bits` per value: 16, 12 (bf16 with coded exponents where
// they allow it), 8 or 4; the last two with int8 values and `scales` [N, groups].
template <uint64_t kMagic, int kRowsPerPart, sparse_backend::unstructured::WritePart kWritePart,
          int kSmallestGroup, int kScaleTile = 0, int64_t kMostColumns = INT64_MAX>
Tensor unstructured_lower(const Tensor& mask, const Tensor& values, const std::optional<Tensor>& scales,
                          int64_t in_features, int64_t bits, int64_t group_size, int64_t activation_bits) {
  using namespace sparse_backend::unstructured;
  std::vector<int64_t> start;
  STD_TORCH_CHECK(in_features <= kMostColumns, "this format holds up to ", kMostColumns, " columns, not ",
                  in_features);
  Canonical weight = canonical(mask, values, in_features, start);
  const bool integer = is_integer(weight.values);
  STD_TORCH_CHECK(integer ? bits == 8 || bits == 4 : bits == 16 || bits == 12, "values of ",
                  integer ? "int8 take 8 or 4" : "bfloat16 and float16 take 16 or 12", " bits, not ", bits);
  STD_TORCH_CHECK(integer ? activation_bits == 8 || activation_bits == 16 : activation_bits == 0,
                  "activation_bits must be 8 or 16 for integer values, 0 for others");
  STD_TORCH_CHECK(group_size == 0 || (integer && group_size >= kSmallestGroup && group_size <= 256 &&
                                      (group_size & (group_size - 1)) == 0),
                  "group_size must be 0, or ", kSmallestGroup, " to 256 for integer values, got ",
                  group_size);
  const float* scale_data = nullptr;
  if (integer) {
    if (bits == 4) weight.values = Values::kInt4;
    const int64_t groups = group_size > 0 ? (in_features + group_size - 1) / group_size : 1;
    STD_TORCH_CHECK(
        scales.has_value() && scales->scalar_type() == ScalarType::Float && scales->dim() == 2 &&
            scales->is_contiguous() && scales->size(0) == weight.out_features && scales->size(1) == groups,
        "integer values need contiguous float32 scales [", weight.out_features, ", ", groups, "]");
    scale_data = static_cast<const float*>(scales->const_data_ptr());
  }
  const Settings settings{bits == 12, static_cast<int32_t>(group_size), static_cast<int32_t>(activation_bits),
                          kScaleTile};
  const auto pool = torch_pool();
  const Built built = build(weight, start.data(), settings, kMagic, kRowsPerPart, kWritePart, pool);
  Tensor packed = torch::stable::new_empty(mask, {built.header.total_bytes});
  auto* buffer = static_cast<uint8_t*>(packed.mutable_data_ptr());
  sparse_backend::advise_huge_pages(buffer, built.header.total_bytes);
  write(built, scale_data, buffer, pool);
  return packed;
}

constexpr auto bitmask_lower =
    unstructured_lower<sparse_backend::bitmask::kMagic, sparse_backend::bitmask::kPanelRows,
                       sparse_backend::bitmask::write_panel, 64>;
constexpr auto lanes_lower =
    unstructured_lower<sparse_backend::lanes::kMagic, sparse_backend::lanes::kStripRows,
                       sparse_backend::lanes::write_strip, 32, sparse_backend::lanes::kStripRows,
                       sparse_backend::lanes::kMaxColumns>;
constexpr auto sell_lower = unstructured_lower<sparse_backend::sell::kMagic, sparse_backend::sell::kStripRows,
                                               sparse_backend::sell::write_strip, 128>;

// What every linear op checks and allocates alike. `x` and `bias` are kept contiguous here.
struct LinearTensors {
  DType x_type, bias_type = DType::kFp32;
  int64_t tokens = 1;
  Tensor y, x, bias;
  const void* bias_data = nullptr;
};

LinearTensors linear_tensors(const Tensor& x, const std::optional<Tensor>& bias, int64_t n, int64_t k,
                             int64_t out_features) {
  LinearTensors out;
  out.x_type = dtype_of(x, "x");
  STD_TORCH_CHECK(n == out_features, "packed weight has ", n, " output features, not ", out_features);
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == k,
                  "the last dimension of x must be in_features = ", k);
  std::vector<int64_t> shape;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) {
    shape.push_back(x.size(d));
    out.tokens *= x.size(d);
  }
  shape.push_back(n);
  out.y = torch::stable::new_empty(x, shape);
  out.x = x.is_contiguous() ? x : torch::stable::contiguous(x);
  if (bias.has_value()) {
    out.bias_type = dtype_of(*bias, "bias");
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == n, "bias must have shape [", n, "]");
    out.bias = bias->is_contiguous() ? *bias : torch::stable::contiguous(*bias);
    out.bias_data = out.bias.const_data_ptr();
  }
  return out;
}

template <uint64_t kMagic, int kRowsPerPart, auto kLinear>
Tensor unstructured_linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
                           int64_t out_features) {
  using namespace sparse_backend::unstructured;
  check_bytes(packed, 1, "packed weight");
  View weight;
  const char* problem = parse(static_cast<const uint8_t*>(packed.const_data_ptr()), packed.numel(), kMagic,
                              kRowsPerPart, &weight);
  STD_TORCH_CHECK(problem == nullptr, problem);
  LinearTensors t =
      linear_tensors(x, bias, weight.header.out_features, weight.header.in_features, out_features);
  if (t.y.numel() == 0) return t.y;
  LinearArgs args{t.x.const_data_ptr(), t.x_type, t.tokens, t.bias_data, t.bias_type, t.y.mutable_data_ptr()};
  kLinear(weight, args, torch_pool());
  return t.y;
}

constexpr auto bitmask_linear =
    unstructured_linear<sparse_backend::bitmask::kMagic, sparse_backend::bitmask::kPanelRows,
                        sparse_backend::bitmask::linear>;
constexpr auto lanes_linear =
    unstructured_linear<sparse_backend::lanes::kMagic, sparse_backend::lanes::kStripRows,
                        sparse_backend::lanes::linear>;
constexpr auto sell_linear =
    unstructured_linear<sparse_backend::sell::kMagic, sparse_backend::sell::kStripRows,
                        sparse_backend::sell::linear>;

// (low [N, K], high [N, ceil(K / 2)], exponents [16], escapes [escapes, 3] of row, column and bits).
std::tuple<Tensor, Tensor, Tensor, Tensor> bf16x12_encode(const Tensor& weight) {
  using namespace sparse_backend::lanes;
  STD_TORCH_CHECK(weight.dim() == 2 && weight.scalar_type() == ScalarType::BFloat16,
                  "weight must be bfloat16 [N, K]");
  const Tensor dense = torch::stable::contiguous(weight);
  const int64_t n = dense.size(0), k = dense.size(1);
  Tensor low = torch::stable::new_empty(dense, {n, k}, ScalarType::Byte);
  Tensor high = torch::stable::new_empty(dense, {n, (k + 1) / 2}, ScalarType::Byte);
  Tensor exponents = torch::stable::new_empty(dense, {16}, ScalarType::Byte);
  sparse_backend::unstructured::ExponentTable table{};
  std::vector<Escaped> found;
  const int64_t bad =
      encode_bf16x12(static_cast<const uint16_t*>(dense.const_data_ptr()), n, k,
                     static_cast<uint8_t*>(low.mutable_data_ptr()),
                     static_cast<uint8_t*>(high.mutable_data_ptr()), &table, &found, torch_pool());
  STD_TORCH_CHECK(bad == 0, "weight has ", bad, " NaN or infinite value(s)");
  std::memcpy(exponents.mutable_data_ptr(), &table, sizeof(table));
  const auto count = static_cast<int64_t>(found.size());
  Tensor escapes = torch::stable::new_empty(dense, {count, 3}, ScalarType::Int);
  if (count > 0) std::memcpy(escapes.mutable_data_ptr(), found.data(), count * sizeof(Escaped));
  return {low, high, exponents, escapes};
}

Tensor bf16x12_decode(const Tensor& low, const Tensor& high, const Tensor& exponents, const Tensor& escapes) {
  using namespace sparse_backend::lanes;
  check_bytes(low, 2, "low");
  check_bytes(high, 2, "high");
  check_bytes(exponents, 1, "exponents");
  const int64_t n = low.size(0), k = low.size(1);
  STD_TORCH_CHECK(high.size(0) == n && high.size(1) == (k + 1) / 2 && exponents.size(0) == 16,
                  "high must be [", n, ", ", (k + 1) / 2, "] and exponents [16]");
  STD_TORCH_CHECK(escapes.scalar_type() == ScalarType::Int && escapes.dim() == 2 && escapes.size(1) == 3 &&
                      escapes.is_contiguous(),
                  "escapes must be a contiguous int32 tensor [escapes, 3]");
  Tensor weight = torch::stable::new_empty(low, {n, k}, ScalarType::BFloat16);
  auto* out = static_cast<uint16_t*>(weight.mutable_data_ptr());
  sparse_backend::unstructured::ExponentTable table;
  std::memcpy(&table, exponents.const_data_ptr(), sizeof(table));
  decode_bf16x12(static_cast<const uint8_t*>(low.const_data_ptr()),
                 static_cast<const uint8_t*>(high.const_data_ptr()), table, n, k, out, torch_pool());
  const auto* list = static_cast<const Escaped*>(escapes.const_data_ptr());
  for (int64_t i = 0; i < escapes.size(0); ++i) {
    const Escaped& e = list[i];
    STD_TORCH_CHECK(e.row >= 0 && e.row < n && e.column >= 0 && e.column < k && e.bits >= 0 && e.bits < 65536,
                    "escape ", i, " lies outside the weight");
    out[e.row * k + e.column] = static_cast<uint16_t>(e.bits);
  }
  return weight;
}

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
  m.def("count_nonzero(Tensor weight) -> int");
  m.def("bitmask_pack(Tensor weight) -> (Tensor mask, Tensor values)");
  m.def("bitmask_unpack(Tensor mask, Tensor values, int in_features) -> Tensor");
  m.def(
      "bitmask_lower(Tensor mask, Tensor values, Tensor? scales, int in_features, int bits, int group_size, "
      "int activation_bits) -> Tensor");
  m.def(
      "lanes_lower(Tensor mask, Tensor values, Tensor? scales, int in_features, int bits, int group_size, "
      "int activation_bits) -> Tensor");
  m.def("bf16x12_encode(Tensor weight) -> (Tensor low, Tensor high, Tensor exponents, Tensor escapes)");
  m.def("bf16x12_decode(Tensor low, Tensor high, Tensor exponents, Tensor escapes) -> Tensor");
  m.def("lanes_linear(Tensor x, Tensor packed, Tensor? bias, int out_features) -> Tensor");
  m.def("bitmask_linear(Tensor x, Tensor packed, Tensor? bias, int out_features) -> Tensor");
  m.def(
      "sell_lower(Tensor mask, Tensor values, Tensor? scales, int in_features, int bits, int group_size, "
      "int activation_bits) -> Tensor");
  m.def("sell_linear(Tensor x, Tensor packed, Tensor? bias, int out_features) -> Tensor");
  m.def("ternary_scan(Tensor weight, int group_size) -> (bool ternary, Tensor codes, Tensor scales)");
  m.def("ternary_encode(Tensor codes, int per_byte) -> Tensor");
  m.def("ternary_decode(Tensor packed, int per_byte, int in_features) -> Tensor");
  m.def("lowbit_lower(Tensor weights, int per_byte, int group_size, int limbs) -> Tensor");
  m.def(
      "lowbit_linear(Tensor x, Tensor packed, Tensor scales, Tensor? bias, int out_features, "
      "Tensor? absmax=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sparse_backend, CPU, m) {
  m.impl("count_nonzero", TORCH_BOX(&count_nonzero));
  m.impl("bitmask_pack", TORCH_BOX(&bitmask_pack));
  m.impl("bitmask_unpack", TORCH_BOX(&bitmask_unpack));
  m.impl("bitmask_lower", TORCH_BOX(bitmask_lower));
  m.impl("bitmask_linear", TORCH_BOX(bitmask_linear));
  m.impl("bf16x12_encode", TORCH_BOX(&bf16x12_encode));
  m.impl("bf16x12_decode", TORCH_BOX(&bf16x12_decode));
  m.impl("lanes_lower", TORCH_BOX(lanes_lower));
  m.impl("lanes_linear", TORCH_BOX(lanes_linear));
  m.impl("sell_lower", TORCH_BOX(sell_lower));
  m.impl("sell_linear", TORCH_BOX(sell_linear));
  m.impl("ternary_scan", TORCH_BOX(&ternary_scan));
  m.impl("ternary_encode", TORCH_BOX(&ternary_encode));
  m.impl("ternary_decode", TORCH_BOX(&ternary_decode));
  m.impl("lowbit_lower", TORCH_BOX(&lowbit_lower));
  m.impl("lowbit_linear", TORCH_BOX(&lowbit_linear));
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

__attribute__((visibility("default"))) const char* sparse_backend_bitmask_kernel(int values, int x_type) {
  return sparse_backend::bitmask::kernel_name(static_cast<sparse_backend::unstructured::Values>(values),
                                              static_cast<DType>(x_type));
}

__attribute__((visibility("default"))) const char* sparse_backend_lanes_kernel(int values, int x_type) {
  return sparse_backend::lanes::kernel_name(static_cast<sparse_backend::unstructured::Values>(values),
                                            static_cast<DType>(x_type));
}

__attribute__((visibility("default"))) const char* sparse_backend_sell_kernel(int values) {
  return sparse_backend::sell::kernel_name(static_cast<sparse_backend::unstructured::Values>(values));
}

__attribute__((visibility("default"))) const char* sparse_backend_lowbit_kernel() {
  return sparse_backend::lowbit::kernel_name();
}

}  // extern "C"

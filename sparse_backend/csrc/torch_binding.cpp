// The ops of sparse and lanes weights (see torch_common.h; ternary and int8 ones in torch_lowbit.cpp): checks
// arguments, allocates outputs, hands plain pointers to the kernels.
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "bitmask/linear.h"
#include "bitmask/pack.h"
#include "cpu_features.h"
#include "huge_pages.h"
#include "lanes/bf16x12.h"
#include "lanes/linear.h"
#include "lanes/pack.h"
#include "sell/linear.h"
#include "sell/pack.h"
#include "torch_common.h"
#include "unstructured/halves.h"

namespace {

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

Tensor written(const sparse_backend::unstructured::Built& built,
               const sparse_backend::unstructured::Canonical& weight, const int64_t* row_start,
               const float* scales, const Tensor& like) {
  const int64_t bytes = built.header.total_bytes;
  Tensor packed = torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
  auto* buffer = static_cast<uint8_t*>(packed.mutable_data_ptr());
  sparse_backend::advise_huge_pages(buffer, bytes);
  write(built, weight, row_start, scales, buffer, torch_pool());
  return packed;
}

// Machine form of an unstructured format. `bits` per value: 16, 12 (bf16 with coded exponents where
// they allow it), 8 or 4; the last two with int8 values and `scales` [N, groups].
template <const sparse_backend::unstructured::Stream& kStream, int kSmallestGroup,
          int64_t kMostColumns = INT64_MAX>
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
  const Settings settings{bits == 12, static_cast<int32_t>(group_size),
                          static_cast<int32_t>(activation_bits)};
  return written(build(weight, start.data(), settings, kStream, {}, torch_pool()), weight, start.data(),
                 scale_data, mask);
}

constexpr auto bitmask_lower = unstructured_lower<sparse_backend::bitmask::kStream, 64>;
constexpr auto lanes_lower =
    unstructured_lower<sparse_backend::lanes::kStream, 32, sparse_backend::lanes::kMaxColumns>;
constexpr auto sell_lower = unstructured_lower<sparse_backend::sell::kStream, 128>;

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
    unstructured_linear<sparse_backend::bitmask::kMagic, sparse_backend::bitmask::kStripRows,
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

// Checks the tensors of a coded weight; `table` is its exponents.
void check_bf16x12(const Tensor& low, const Tensor& high, const Tensor& exponents, const Tensor& escapes,
                   sparse_backend::unstructured::ExponentTable* table) {
  check_bytes(low, 2, "low");
  check_bytes(high, 2, "high");
  check_bytes(exponents, 1, "exponents");
  const int64_t n = low.size(0), k = low.size(1);
  STD_TORCH_CHECK(high.size(0) == n && high.size(1) == (k + 1) / 2 && exponents.size(0) == 16,
                  "high must be [", n, ", ", (k + 1) / 2, "] and exponents [16]");
  STD_TORCH_CHECK(escapes.scalar_type() == ScalarType::Int && escapes.dim() == 2 && escapes.size(1) == 3 &&
                      escapes.is_contiguous(),
                  "escapes must be a contiguous int32 tensor [escapes, 3]");
  std::memcpy(table, exponents.const_data_ptr(), sizeof(*table));
  const auto* list = static_cast<const sparse_backend::lanes::Escaped*>(escapes.const_data_ptr());
  for (int64_t i = 0; i < escapes.size(0); ++i) {
    const auto& e = list[i];
    STD_TORCH_CHECK(e.row >= 0 && e.row < n && e.column >= 0 && e.column < k && e.bits >= 0 && e.bits < 65536,
                    "escape ", i, " lies outside the weight");
    STD_TORCH_CHECK(i == 0 || list[i - 1].row <= e.row, "escape ", i, " is not in the order of rows");
  }
}

Tensor bf16x12_decode(const Tensor& low, const Tensor& high, const Tensor& exponents, const Tensor& escapes) {
  using namespace sparse_backend::lanes;
  sparse_backend::unstructured::ExponentTable table;
  check_bf16x12(low, high, exponents, escapes, &table);
  const int64_t n = low.size(0), k = low.size(1);
  Tensor weight = torch::stable::new_empty(low, {n, k}, ScalarType::BFloat16);
  auto* out = static_cast<uint16_t*>(weight.mutable_data_ptr());
  decode_bf16x12(static_cast<const uint8_t*>(low.const_data_ptr()),
                 static_cast<const uint8_t*>(high.const_data_ptr()), table, n, k, out, torch_pool());
  const auto* list = static_cast<const Escaped*>(escapes.const_data_ptr());
  for (int64_t i = 0; i < escapes.size(0); ++i) {
    const Escaped& e = list[i];
    out[e.row * k + e.column] = static_cast<uint16_t>(e.bits);
  }
  return weight;
}

// Machine form (lanes) of a coded weight: its bytes in another order.
Tensor bf16x12_lower(const Tensor& low, const Tensor& high, const Tensor& exponents, const Tensor& escapes) {
  using namespace sparse_backend::unstructured;
  Encoding encoding{};
  check_bf16x12(low, high, exponents, escapes, &encoding.exponents);
  const int64_t n = low.size(0), k = low.size(1), count = escapes.size(0);
  STD_TORCH_CHECK(k <= sparse_backend::lanes::kMaxColumns, "this format holds up to ",
                  sparse_backend::lanes::kMaxColumns, " columns, not ", k);
  STD_TORCH_CHECK(encoding.exponents.exponent[kEscapeCode] == 0 && count < int64_t{1} << 32,
                  "the last of the exponents must be 0");
  const auto* list = static_cast<const sparse_backend::lanes::Escaped*>(escapes.const_data_ptr());
  encoding.escape_start.assign(n + 1, 0);
  for (int64_t i = 0; i < count; ++i) {
    ++encoding.escape_start[list[i].row + 1];
    encoding.escapes.push_back(
        {static_cast<uint32_t>(list[i].column), static_cast<uint16_t>(list[i].bits), 0});
  }
  for (int64_t row = 0; row < n; ++row) encoding.escape_start[row + 1] += encoding.escape_start[row];
  const Canonical weight{n,
                         k,
                         Values::kBf16x12,
                         nullptr,
                         low.const_data_ptr(),
                         n * k,
                         static_cast<const uint8_t*>(high.const_data_ptr())};
  const Built built =
      build(weight, nullptr, {}, sparse_backend::lanes::kStream, std::move(encoding), torch_pool());
  return written(built, weight, nullptr, nullptr, low);
}

// int8 codes -8..7 [rows, columns] as half bytes [rows, ceil(columns / 2)].
Tensor join_halves(const Tensor& codes) {
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Char && codes.dim() == 2 && codes.is_contiguous(),
                  "codes must be a contiguous int8 tensor [rows, columns]");
  Tensor out = torch::stable::new_empty(codes, {codes.size(0), (codes.size(1) + 1) / 2}, ScalarType::Byte);
  sparse_backend::unstructured::join_halves(static_cast<const int8_t*>(codes.const_data_ptr()), codes.size(0),
                                            codes.size(1), static_cast<uint8_t*>(out.mutable_data_ptr()),
                                            torch_pool());
  return out;
}

Tensor split_halves(const Tensor& bytes, int64_t columns) {
  check_bytes(bytes, 2, "bytes");
  STD_TORCH_CHECK(columns >= 0 && bytes.size(1) == (columns + 1) / 2, columns, " codes per row need ",
                  (columns + 1) / 2, " bytes, there are ", bytes.size(1));
  Tensor out = torch::stable::new_empty(bytes, {bytes.size(0), columns}, ScalarType::Char);
  sparse_backend::unstructured::split_halves(static_cast<const uint8_t*>(bytes.const_data_ptr()),
                                             bytes.size(0), columns,
                                             static_cast<int8_t*>(out.mutable_data_ptr()), torch_pool());
  return out;
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
  m.def("bf16x12_lower(Tensor low, Tensor high, Tensor exponents, Tensor escapes) -> Tensor");
  m.def("join_halves(Tensor codes) -> Tensor");
  m.def("split_halves(Tensor bytes, int columns) -> Tensor");
  m.def("lanes_linear(Tensor x, Tensor packed, Tensor? bias, int out_features) -> Tensor");
  m.def("bitmask_linear(Tensor x, Tensor packed, Tensor? bias, int out_features) -> Tensor");
  m.def(
      "sell_lower(Tensor mask, Tensor values, Tensor? scales, int in_features, int bits, int group_size, "
      "int activation_bits) -> Tensor");
  m.def("sell_linear(Tensor x, Tensor packed, Tensor? bias, int out_features) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sparse_backend, CPU, m) {
  m.impl("count_nonzero", TORCH_BOX(&count_nonzero));
  m.impl("bitmask_pack", TORCH_BOX(&bitmask_pack));
  m.impl("bitmask_unpack", TORCH_BOX(&bitmask_unpack));
  m.impl("bitmask_lower", TORCH_BOX(bitmask_lower));
  m.impl("bitmask_linear", TORCH_BOX(bitmask_linear));
  m.impl("bf16x12_encode", TORCH_BOX(&bf16x12_encode));
  m.impl("bf16x12_decode", TORCH_BOX(&bf16x12_decode));
  m.impl("join_halves", TORCH_BOX(&join_halves));
  m.impl("split_halves", TORCH_BOX(&split_halves));
  m.impl("bf16x12_lower", TORCH_BOX(&bf16x12_lower));
  m.impl("lanes_lower", TORCH_BOX(lanes_lower));
  m.impl("lanes_linear", TORCH_BOX(lanes_linear));
  m.impl("sell_lower", TORCH_BOX(sell_lower));
  m.impl("sell_linear", TORCH_BOX(sell_linear));
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

__attribute__((visibility("default"))) const char* sparse_backend_sell_kernel(int values, int x_type) {
  return sparse_backend::sell::kernel_name(static_cast<sparse_backend::unstructured::Values>(values),
                                           static_cast<DType>(x_type));
}

}  // extern "C"

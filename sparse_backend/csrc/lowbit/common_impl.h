// What every instruction set's file compiles for itself: quantising activations before the
// dot products, and scaling the integer sums after them. Plain loops that compilers vectorise;
// built with -ffp-contract=off, so that all instruction sets round alike.
#pragma once

#include "../activations.h"
#include "kernels.h"

namespace sparse_backend::lowbit {
namespace {

template <DType kType>
inline void quantise_int8(const void* x, int64_t count, float factor, int8_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    const int32_t value = round_to_int(read_float<kType>(x, i) * factor);
    const int32_t low = value < -127 ? -127 : value;
    out[i] = static_cast<int8_t>(low > 127 ? 127 : low);
  }
}

// Two limbs: activation = 128 * high + low, low in [-64, 63].
template <DType kType>
inline void quantise_two(const void* x, int64_t count, float factor, int8_t* low, int8_t* high) {
  for (int64_t i = 0; i < count; ++i) {
    const int32_t value = round_to_int(read_float<kType>(x, i) * factor);
    const int32_t rest = ((value + 64) & 127) - 64;
    low[i] = static_cast<int8_t>(rest);
    high[i] = static_cast<int8_t>((value - rest) >> 7);
  }
}

// Three limbs to base 256, each in [-128, 127].
template <DType kType>
inline void quantise_three(const void* x, int64_t count, float factor, int8_t* out, int64_t stride) {
  for (int64_t i = 0; i < count; ++i) {
    const int32_t value = round_to_int(read_float<kType>(x, i) * factor);
    const int32_t low = ((value + 128) & 255) - 128;
    const int32_t rest = (value - low) >> 8;
    const int32_t middle = ((rest + 128) & 255) - 128;
    out[i] = static_cast<int8_t>(low);
    out[i + stride] = static_cast<int8_t>(middle);
    out[i + 2 * stride] = static_cast<int8_t>((rest - middle) >> 8);
  }
}

inline int32_t sum_of(const int8_t* x, int64_t count) {
  int32_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += x[i];
  return sum;
}

// Factors that make integers of activations. One limb: 127 / absmax, the rule BitNet models are
// trained with. Three limbs: a power of two that leaves 22 bits, so an activation within 2^-14 of
// the largest one keeps all bits of a bf16; what the rest lose is of the size fp32 sums lose.
inline float activation_factor(int limbs, float absmax) {
  if (limbs == 1)
    return 1.0F / (absmax > 1e-5F ? absmax : 1e-5F) * 127.0F;  // torch's `127 / tensor`, to the bit
  if (limbs == 2) return absmax > 1e-30F ? 16256.0F / absmax : 16256.0F / 1e-30F;
  int exponent = static_cast<int>(bits_from_float(absmax) >> 23) - 126;  // absmax < 2^exponent
  if (exponent < -104) exponent = -104;
  return float_from_bits(static_cast<uint32_t>(22 - exponent + 127) << 23);
}

template <DType kType>
void prepare_typed(const PrepareArgs& a) {
  const int64_t k = a.plan->columns, padded = a.plan->padded;
  const float absmax = a.absmax != nullptr ? *a.absmax : largest_magnitude<kType>(a.x, k);
  for (int limb = 0; limb < a.limbs; ++limb) std::memset(a.out + limb * padded + k, 0, padded - k);
  if (!(absmax <= 3.4028234e38F)) {  // infinite or NaN: so is every output
    std::memset(a.out, 0, a.limbs * padded);
    std::memset(a.sums, 0, a.limbs * a.plan->segments * sizeof(int32_t));
    *a.scale = float_from_bits(0x7FC00000U);
    return;
  }
  const float factor = activation_factor(a.limbs, absmax);
  *a.scale = 1.0F / factor;
  if (a.limbs == 1) quantise_int8<kType>(a.x, k, factor, a.out);
  if (a.limbs == 2) quantise_two<kType>(a.x, k, factor, a.out, a.out + padded);
  if (a.limbs == 3) quantise_three<kType>(a.x, k, factor, a.out, padded);
  const int64_t segment = a.plan->segment > 0 ? a.plan->segment : k;
  for (int limb = 0; limb < a.limbs; ++limb) {
    for (int64_t s = 0; s < a.plan->segments; ++s) {
      const int64_t begin = s * segment, end = begin + segment < k ? begin + segment : k;
      a.sums[limb * a.plan->segments + s] = sum_of(a.out + limb * padded + begin, end - begin);
    }
  }
}

void prepare(const PrepareArgs& a) {
  if (a.type == DType::kBf16) return prepare_typed<DType::kBf16>(a);
  if (a.type == DType::kFp16) return prepare_typed<DType::kFp16>(a);
  prepare_typed<DType::kFp32>(a);
}

template <DType kType>
inline void read_floats(const void* data, int64_t first, int64_t count, float out[kUnitRows]) {
  if (count == kUnitRows) {  // a constant count, which compilers vectorise
    for (int i = 0; i < kUnitRows; ++i) out[i] = read_float<kType>(data, first + i);
    return;
  }
  for (int64_t i = 0; i < count; ++i) out[i] = read_float<kType>(data, first + i);
}

inline void read_floats(const void* data, DType type, int64_t first, int64_t count, float out[kUnitRows]) {
  if (type == DType::kBf16) return read_floats<DType::kBf16>(data, first, count, out);
  if (type == DType::kFp16) return read_floats<DType::kFp16>(data, first, count, out);
  read_floats<DType::kFp32>(data, first, count, out);
}

// The exact sums of one row of activations over one scale group.
inline void sum_group(const FinishArgs& a, int row, int64_t segment, int32_t offset, int32_t sum[kUnitRows]) {
  const int64_t segments = a.plan->segments;
  const int64_t end = segment + a.segments_per_group;
  const int64_t last = end < segments ? end : segments;
  const int64_t stride = int64_t{a.rows} * kUnitRows;
  const int32_t* in = a.sums_out + segment * stride + int64_t{row} * kUnitRows;
  const int32_t* x_sums = a.x_sums + int64_t{row} * segments;
  int32_t correction = offset * x_sums[segment];
  for (int i = 0; i < kUnitRows; ++i) sum[i] = in[i] - correction;
  for (int64_t s = segment + 1; s < last; ++s) {
    in += stride;
    correction = offset * x_sums[s];
    for (int i = 0; i < kUnitRows; ++i) sum[i] += in[i] - correction;
  }
}

// The integer that the limbs of one token stand for, as floats: what fits 24 bits is exact.
inline void sum_limbs(const FinishArgs& a, int token, int64_t segment, int32_t offset, float out[kUnitRows]) {
  int32_t sum[kUnitRows];
  if (a.limbs == 1) {
    sum_group(a, token, segment, offset, sum);
    for (int i = 0; i < kUnitRows; ++i) out[i] = static_cast<float>(sum[i]);
    return;
  }
  const double base = a.limbs == 2 ? 128.0 : 256.0;
  double total[kUnitRows] = {};
  for (int limb = a.limbs - 1; limb >= 0; --limb) {
    sum_group(a, token * a.limbs + limb, segment, offset, sum);
    for (int i = 0; i < kUnitRows; ++i) total[i] = total[i] * base + sum[i];
  }
  for (int i = 0; i < kUnitRows; ++i) out[i] = static_cast<float>(total[i]);
}

inline void write_floats(const FinishArgs& a, int token, const float value[kUnitRows]) {
  const int64_t at = token * a.out_features + a.first_row;
  if (a.type == DType::kBf16) {
    uint16_t rounded[kUnitRows];
    for (int i = 0; i < kUnitRows; ++i) rounded[i] = bf16_from_float(value[i]);
    std::memcpy(static_cast<uint16_t*>(a.y) + at, rounded, a.count * sizeof(uint16_t));
  } else if (a.type == DType::kFp16) {
    uint16_t* y = static_cast<uint16_t*>(a.y) + at;
    for (int64_t i = 0; i < a.count; ++i) y[i] = fp16_from_float(value[i]);
  } else {
    std::memcpy(static_cast<float*>(a.y) + at, value, a.count * sizeof(float));
  }
}

// kInt8Offset: what the kernels added to int8 weights, 128 or 0.
template <int kInt8Offset>
void finish(const FinishArgs& a) {
  const int tokens = a.rows / a.limbs;
  const int32_t offset = a.plan->storage == Storage::kInt8 ? kInt8Offset : 1;
  const int64_t scale_bytes = a.scale_type == DType::kFp32 ? 4 : 2;
  const int64_t group_bytes = a.scale_stride * scale_bytes;
  float bias[kUnitRows] = {}, scale[kUnitRows] = {};
  if (a.bias != nullptr) read_floats(a.bias, a.bias_type, a.first_row, a.count, bias);
  if (a.scale_stride == 0) {
    read_floats(a.scales, a.scale_type, 0, 1, scale);
    for (int i = 1; i < kUnitRows; ++i) scale[i] = scale[0];
  }
  for (int t = 0; t < tokens; ++t) {
    float value[kUnitRows] = {}, part[kUnitRows];
    const uint8_t* scales = static_cast<const uint8_t*>(a.scales);
    for (int64_t s = 0; s < a.plan->segments; s += a.segments_per_group, scales += group_bytes) {
      if (a.scale_stride != 0) read_floats(scales, a.scale_type, a.first_row, a.count, scale);
      sum_limbs(a, t, s, offset, part);
      for (int i = 0; i < kUnitRows; ++i) value[i] += part[i] * scale[i];
    }
    for (int i = 0; i < kUnitRows; ++i) value[i] = value[i] * a.x_scales[t] + bias[i];
    write_floats(a, t, value);
  }
}

}  // namespace
}  // namespace sparse_backend::lowbit

// Types shared by every kernel family. Knows nothing of torch.
//
// Everything here is plain data or lives in an unnamed namespace: these headers are
// compiled once per instruction set, and the linker must never pick the AVX-512 copy
// of a function for a machine that lacks it.
#pragma once

#include <cstdint>
#include <cstring>

namespace sparse_backend {

enum class DType : int32_t { kBf16 = 0, kFp16 = 1, kFp32 = 2 };

// torch's thread pool, passed down as a function so that kernels need no torch header
// and no OpenMP runtime of their own. `run` calls task(index, context) for every index
// in [0, count), in any order and on any thread.
struct ThreadPool {
  int threads;
  void (*run)(int64_t count, void (*task)(int64_t index, void* context), void* context);
};

namespace {

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t bits_from_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float float_from_bf16(uint16_t value) { return float_from_bits(static_cast<uint32_t>(value) << 16); }

// Round to nearest even; NaN stays NaN (its payload could round to infinity). Without a branch, so
// that loops over it become vectors.
inline uint16_t bf16_from_float(float value) {
  const uint32_t bits = bits_from_float(value);
  const uint32_t rounded = (bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40U;
  return static_cast<uint16_t>((bits & 0x7FFFFFFFU) > 0x7F800000U ? nan : rounded);
}

inline float float_from_fp16(uint16_t value) {
  const uint32_t sign = static_cast<uint32_t>(value & 0x8000U) << 16;
  const uint32_t magnitude = value & 0x7FFFU;
  if (magnitude >= 0x7C00U) return float_from_bits(sign | 0x7F800000U | ((magnitude & 0x3FFU) << 13));
  // Moving the 5-bit exponent into an 8-bit one is a multiplication by 2^112, which
  // also normalises subnormals.
  const float scaled = float_from_bits(magnitude << 13) * 0x1p112F;
  return float_from_bits(sign | bits_from_float(scaled));
}

inline uint16_t fp16_from_float(float value) {
  const uint32_t bits = bits_from_float(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000U);
  const uint32_t magnitude = bits & 0x7FFFFFFFU;
  if (magnitude > 0x7F800000U) return sign | 0x7E00U;
  if (magnitude >= 0x477FF000U) return sign | 0x7C00U;  // rounds past 65504
  if (magnitude < 0x38800000U) {
    // Subnormal result: adding 0.5 aligns the value so that the FPU rounds it to even.
    const float aligned = float_from_bits(magnitude) + 0.5F;
    return sign | static_cast<uint16_t>(bits_from_float(aligned) - 0x3F000000U);
  }
  const uint32_t rounded = magnitude + 0xFFFU + ((magnitude >> 13) & 1U);
  return sign | static_cast<uint16_t>((rounded - 0x38000000U) >> 13);
}

inline int64_t element_bytes(DType type) { return type == DType::kFp32 ? 4 : 2; }

inline void store_float(void* data, DType dtype, int64_t index, float value) {
  switch (dtype) {
    case DType::kBf16:
      static_cast<uint16_t*>(data)[index] = bf16_from_float(value);
      break;
    case DType::kFp16:
      static_cast<uint16_t*>(data)[index] = fp16_from_float(value);
      break;
    case DType::kFp32:
      static_cast<float*>(data)[index] = value;
      break;
  }
}

inline float load_as_float(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kBf16:
      return float_from_bf16(static_cast<const uint16_t*>(data)[index]);
    case DType::kFp16:
      return float_from_fp16(static_cast<const uint16_t*>(data)[index]);
    default:
      return static_cast<const float*>(data)[index];
  }
}

}  // namespace
}  // namespace sparse_backend

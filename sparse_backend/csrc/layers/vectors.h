// Float vectors of one lane, the reference for the wider ones: vectors_avx2.h, vectors_avx512.h.
// Kernels are templates over such a class. `part` functions touch the first `count` elements only;
// lanes past them read as zero.
#pragma once

#include "../activations.h"

namespace sparse_backend::layers {
namespace {

struct ScalarVector {
  static constexpr int kLanes = 1;
  static constexpr int kTileTokens = 2;  // of a dense product: 4 rows by this
  static constexpr int kTileParts = 2;   // vectors of a head that are summed at once
  using Reg = float;

  static inline Reg set1(float v) { return v; }
  static inline Reg load(const float* p) { return *p; }
  static inline void store(float* p, Reg v) { *p = v; }
  static inline Reg add(Reg a, Reg b) { return a + b; }
  static inline Reg sub(Reg a, Reg b) { return a - b; }
  static inline Reg mul(Reg a, Reg b) { return a * b; }
  static inline Reg div(Reg a, Reg b) { return a / b; }
  static inline Reg max(Reg a, Reg b) { return a > b ? a : b; }
  static inline Reg min(Reg a, Reg b) { return a < b ? a : b; }
  static inline Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  static inline float sum(Reg v) { return v; }
  static inline float largest(Reg v) { return v; }
  // `v` where x >= bound or x is NaN, zero elsewhere.
  static inline Reg keep_from(Reg x, Reg bound, Reg v) { return x < bound ? 0.0F : v; }
  // v * 2^n for whole n in [-126, 127].
  static inline Reg scale_by_power(Reg v, Reg n) {
    return v * float_from_bits(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
  }
  static inline Reg nearest(Reg v) { return static_cast<float>(round_to_int(v)); }

  template <DType kType>
  static inline Reg load_as(const void* p, int64_t i) {
    return read_float<kType>(p, i);
  }
  template <DType kType>
  static inline Reg load_part(const void* p, int64_t i, int /*count*/) {
    return read_float<kType>(p, i);
  }
  template <DType kType>
  static inline void store_as(void* p, int64_t i, Reg v) {
    store_float(p, kType, i, v);
  }
  template <DType kType>
  static inline void store_part(void* p, int64_t i, Reg v, int /*count*/) {
    store_as<kType>(p, i, v);
  }
};

}  // namespace
}  // namespace sparse_backend::layers

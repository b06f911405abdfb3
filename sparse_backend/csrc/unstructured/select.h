// Which instruction set's kernels run. Included only by files compiled for the baseline processor.
#pragma once

#include "../cpu_features.h"
#include "linear.h"

namespace sparse_backend::unstructured {

// A family's kernels, by level; nullptr where it, or this build, has none of its own.
template <class Kernels>
struct Levels {
  using Table = const Kernels& (*)(Values);
  Table scalar;
  Table avx2 = nullptr;
  Table avx512 = nullptr;
  Table avx512_bf16 = nullptr;   // bf16 values and activations, vdpbf16ps
  Table avx512_bytes = nullptr;  // integer values, int8 activations
  Table amx = nullptr;           // tiles: bf16 values and activations; integer values
  Table amx_bytes = nullptr;     // integer values, int8 activations
};

template <class Kernels>
const Kernels& at_avx512(const Levels<Kernels>& levels, Values values, bool bf16, bool int8) {
  if (int8 && levels.avx512_bytes != nullptr) return levels.avx512_bytes(values);
  if (bf16 && cpu_features().avx512_bf16) return levels.avx512_bf16(values);
  return levels.avx512(values);
}

// Up to so many tokens integers are faster without tiles, where every group of scales has to wait for one.
constexpr int64_t kTokensWithoutTiles = 4;

// Whether both operands are bf16.
inline bool is_bf16(Values values, DType x_type) {
  return (values == Values::kBf16 || values == Values::kBf16x12) && x_type == DType::kBf16;
}

// Whether the level `amx` has tiles for this.
inline bool takes_tiles(Values values, DType x_type) { return is_integer(values) || is_bf16(values, x_type); }

// What `tokens` tokens are multiplied by; `int8`: integer values whose activations have 8 bits. Integers have
// the same sums with tiles and without; those of floats are rounded in another order, so that all tokens take
// the same way.
template <class Kernels>
const Kernels& select(const Levels<Kernels>& levels, Values values, DType x_type, bool int8, int64_t tokens) {
#if defined(__x86_64__)
  const bool bf16 = is_bf16(values, x_type);
  switch (active_isa()) {
    case Isa::kAmx:
      if (is_integer(values) && tokens <= kTokensWithoutTiles) return at_avx512(levels, values, bf16, int8);
      if (int8 && levels.amx_bytes != nullptr) return levels.amx_bytes(values);
      if (takes_tiles(values, x_type) && levels.amx != nullptr) return levels.amx(values);
      [[fallthrough]];
    case Isa::kAvx512:
      return at_avx512(levels, values, bf16, int8);
    case Isa::kAvx2:
      return levels.avx2(values);
    case Isa::kScalar:
      break;
  }
#endif
  (void)x_type;
  (void)int8;
  (void)tokens;
  return levels.scalar(values);
}

// The name of what large batches are multiplied by.
template <class Kernels>
const char* level_name(const Levels<Kernels>& levels, Values values, DType x_type) {
  return select(levels, values, x_type, false, kTokensWithoutTiles + 1).name;
}

template <class Kernels>
const Kernels& select(const Levels<Kernels>& levels, const Header& weight, const LinearArgs& args) {
  const bool int8 = is_integer(weight.values) && weight.activation_bits == 8;
  return select(levels, weight.values, args.x_type, int8, args.tokens);
}

}  // namespace sparse_backend::unstructured

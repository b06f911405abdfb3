// The interface between the driver (linear.cpp) and the kernels of one instruction set.
#pragma once

#include <cstdint>

#include "../common.h"

namespace sparse_backend::bitmask {

// Rows a kernel call computes: four panels, so that a decoded unit stays in L1.
constexpr int kUnitPanels = 4;
constexpr int kUnitRows = 16;
// Tokens per call for larger batches. A multiple of every kernel's register tile, so that only the
// last call of a large batch has a remainder.
constexpr int kGemmTokens = 96;
// Columns decoded at a time by the batched kernel.
constexpr int kGemmColumns = 256;
// Bytes of scratch the batched kernel needs per thread: decoded weights and accumulators.
constexpr int64_t kGemmScratchBytes =
    int64_t{kUnitRows} * kGemmColumns * 4 + int64_t{kUnitRows} * kGemmTokens * 64;

struct UnitArgs {
  const uint8_t* panel[kUnitPanels];  // start of each panel's stream; the first `panels` are valid
  int panels;                         // 1..kUnitPanels
  int64_t chunks;                     // chunks of 64 columns per panel
  const void* x;                      // prepared activations, token-major
  int64_t x_stride;                   // bytes from one token to the next
  int tokens;
  float* out;     // [tokens][kUnitRows] results
  void* scratch;  // kGemmScratchBytes, 64-byte aligned; only for `gemm`
};

// One instruction set's kernels for one type of stored values.
struct Kernels {
  const char* name;
  int64_t x_element_bytes;  // of the prepared activations
  int gemv_tokens;          // batches up to this size are faster with `gemv`
  // Converts one row of `k` activations to the order and type the kernels multiply by,
  // zero-padded to a multiple of kChunk.
  void (*prepare)(const void* x, DType dtype, int64_t k, void* out);
  // Decodes into registers, for 1..gemv_tokens tokens.
  void (*gemv)(const UnitArgs& args);
  // Decodes blocks of columns into scratch memory, for 1..kGemmTokens tokens.
  void (*gemm)(const UnitArgs& args);
};

const Kernels& scalar_kernels(DType value_type);
#if defined(__x86_64__)
const Kernels& avx2_kernels(DType value_type);
const Kernels& avx512_kernels(DType value_type);
const Kernels& avx512_bf16_kernels();  // bf16 values and bf16 activations, vdpbf16ps
#endif

}  // namespace sparse_backend::bitmask

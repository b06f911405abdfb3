// The interface between the driver (linear.cpp) and the kernels of one instruction set.
#pragma once

#include <cstdint>

#include "../unstructured/strips.h"
#include "layout.h"

namespace sparse_backend::sell {

using unstructured::ExponentTable;
using unstructured::Values;

// Most strips a kernel call computes, block by block in turn: they share the block's activations.
constexpr int kUnitStrips = 8;
// Tokens per call: 128 columns of them are 32 KB of floats.
constexpr int kBatchTokens = 64;
// Entries that the words of a block may need, padded to what decoders write.
constexpr int kBlockWords = kMostEntries + unstructured::kDecodeGroup;
// Bytes of scratch a kernel needs per thread: words, and per entry a weight and an offset.
constexpr int64_t kScratchBytes = int64_t{kBlockWords} * (2 + 4 + 4);

struct UnitArgs {
  const uint8_t* strip[kUnitStrips];  // start of each strip's stream; the first `strips` are valid
  int strips;
  int64_t blocks;                  // blocks of 128 columns per strip
  const ExponentTable* exponents;  // of kBf16x12 values
  const float* scales;             // integer values: of the unit's first row and group
  int64_t scale_stride;            // floats from one group to the next
  int64_t group_blocks;            // blocks per group of scales; 0: one group
  const void* x;                   // prepared activations
  int tokens;
  int token_stride;  // batch: tokens a prepared column holds, a multiple of `lanes`
  // gemv: [tokens][out_stride]; batch: [strips * kStripRows][token_stride]. Of integer values before the
  // activations' scales.
  float* out;
  int64_t out_stride;
  void* scratch;  // kScratchBytes, 64-byte aligned
};

// One instruction set's kernels for one kind of stored values.
struct Kernels {
  const char* name;
  // 1..gemv_most tokens. nullptr, or not for this type of activations: `batch` does it.
  void (*gemv)(const UnitArgs& args);
  int gemv_most;
  bool (*gemv_takes)(DType x_type);
  // Prepares the `k` activations of token `token` of `tokens` for gemv, zero-padded to a multiple of
  // kBlockColumns, 2 bytes each; `spare` has room for one token's. For integer values they are integers of
  // magnitude up to `limit`; returns their scale.
  float (*prepare)(const void* x, DType dtype, int64_t k, int limit, int token, int tokens, int16_t* spare,
                   void* out);
  // Up to kBatchTokens tokens. Prepared: [column][token_stride] of 4 bytes, float or int32.
  void (*batch)(const UnitArgs& args);
  int lanes;
};

const Kernels& scalar_kernels(Values values);
#if defined(__x86_64__)
const Kernels& avx2_kernels(Values values);
const Kernels& avx512_kernels(Values values);
const Kernels& avx512_bf16_kernels(Values values);  // bf16 values and activations, vdpbf16ps
// Of bf16 values and activations, or integer values; of integer values and int8 activations.
const unstructured::StripKernels& amx_kernels(Values values);
const unstructured::StripKernels& amx_byte_kernels(Values values);
#endif

}  // namespace sparse_backend::sell

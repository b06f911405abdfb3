// The interface between the driver (linear.cpp) and the kernels of one instruction set.
#pragma once

#include <cstdint>

#include "../unstructured/values.h"
#include "layout.h"

namespace sparse_backend::bitmask {

using unstructured::ExponentTable;
using unstructured::Values;

// Rows a kernel call computes: four panels, so that a decoded unit stays in L1.
constexpr int kUnitPanels = 4;
constexpr int kUnitRows = 16;
// Tokens per call for larger batches. A multiple of every kernel's register tile, so that only the
// last call of a large batch has a remainder.
constexpr int kGemmTokens = 96;
// Columns decoded at a time by the batched kernel; no group of scales is larger.
constexpr int kGemmColumns = 256;
// Integer sums are moved into floats at the latest after so many columns, before they overflow:
// eight lanes of 512 products of at most 127 * 32767.
constexpr int kFlushColumns = 4096;
// Words that a decoded chunk of one panel may fill.
constexpr int kChunkWords = kPanelRows * kChunk + unstructured::kDecodeGroup;
// Bytes of scratch a kernel needs per thread: decoded weights, accumulators and sums, decoded runs.
constexpr int64_t kScratchBytes = int64_t{kUnitRows} * kGemmColumns * 4 +
                                  2 * int64_t{kUnitRows} * kGemmTokens * 64 +
                                  int64_t{kUnitPanels} * kChunkWords * 2;

struct UnitArgs {
  const uint8_t* panel[kUnitPanels];  // start of each panel's stream; the first `panels` are valid
  int panels;                         // 1..kUnitPanels
  int64_t chunks;                     // chunks of 64 columns per panel
  const ExponentTable* exponents;     // of kBf16x12 values
  int64_t least_decoded;              // values to decode of every chunk, whatever it holds
  const float* scales;                // integer values: of the unit's first row and group
  int64_t scale_stride;               // floats from one group to the next
  int rows;                           // of the unit that exist
  int64_t group_chunks;               // chunks per group of scales; 0: one group
  const void* x;                      // prepared activations, token-major
  int64_t x_stride;                   // bytes from one token to the next
  int tokens;
  float* out;     // [tokens][kUnitRows] results; of integer values before the activations' scales
  void* scratch;  // kScratchBytes, 64-byte aligned
};

// One instruction set's kernels for one kind of stored values.
struct Kernels {
  const char* name;
  int64_t x_element_bytes;  // of the prepared activations
  int gemv_tokens;          // batches up to this size are faster with `gemv`
  // Converts one row of `k` activations to the order and type the kernels multiply by, zero-padded
  // to a multiple of kChunk. For integer values they are int16 below `limit`; returns their scale.
  float (*prepare)(const void* x, DType dtype, int64_t k, int limit, void* out);
  // Decodes into registers, for 1..gemv_tokens tokens.
  void (*gemv)(const UnitArgs& args);
  // Decodes blocks of columns into scratch memory, for 1..kGemmTokens tokens.
  void (*gemm)(const UnitArgs& args);
};

const Kernels& scalar_kernels(Values values);
#if defined(__x86_64__)
const Kernels& avx2_kernels(Values values);
const Kernels& avx512_kernels(Values values);
const Kernels& avx512_bf16_kernels(Values values);  // bf16 values and activations, vdpbf16ps
#endif

}  // namespace sparse_backend::bitmask

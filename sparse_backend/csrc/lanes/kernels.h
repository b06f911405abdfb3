// The interface between the driver (linear.cpp) and the kernels of one instruction set.
//
// Floors per block of 256 weights and token: run_bytes(values, 256) of memory; 16 multiply-adds of 16
// floats, or 8 dot products of 16 pairs.
#pragma once

#include <cstdint>

#include "../unstructured/strips.h"
#include "layout.h"

namespace sparse_backend::lanes {

using unstructured::ExponentTable;

// Tokens per call for larger batches: as many as the accumulators in an L2 cache allow.
constexpr int kGemmTokens = 264;
// Of one strip, decoded at a time by the batched kernel: with 6 KB of activations per tile an L1 cache holds
// it.
constexpr int kChunkBytes = 16384;
// Integer sums are moved into floats at the latest after so many blocks, before they overflow:
// 512 products of at most 127 * 32767.
constexpr int kFlushBlocks = 32;
// Vectors of 16 lanes per token: accumulators of a kernel, at most.
constexpr int kMostSums = 4;
// Strips side by side in a tile, at most.
constexpr int kMostTileStrips = 2;
// Bytes of scratch a kernel needs per thread: of every strip of a tile decoded blocks, accumulators, sums.
constexpr int64_t kDecodedBytes = int64_t{kFlushBlocks} * kBlockWeights * 4;
constexpr int64_t kScratchBytes =
    kMostTileStrips * (kDecodedBytes + int64_t{kGemmTokens} * (kMostSums + 1) * 64);

using Kernels = unstructured::StripKernels;
using unstructured::kUnitStrips;
using UnitArgs = unstructured::StripArgs;

const Kernels& scalar_kernels(Values values);
#if defined(__x86_64__)
const Kernels& avx2_kernels(Values values);
const Kernels& avx512_kernels(Values values);
const Kernels& avx512_bf16_kernels(Values values);  // bf16 values and activations, vdpbf16ps
const Kernels& amx_kernels(Values values);          // tiles; all but fp16, bf16 values with bf16 activations
const Kernels& amx_byte_kernels(Values values);     // integer values and int8 activations
#endif

}  // namespace sparse_backend::lanes

// The interface between the driver (unstructured/strips.cpp) and the kernels of one instruction set.
//
// Floors per 1024 weights and token: 128 bytes of masks and run_bytes(values, stored) of memory; 32 dot
// products of 16 pairs. Measured on Zen 5 per 32 weights of bf16, from L1: 2.1 cycles (expand and kmov 1
// each), 2.7 with everything around them.
#pragma once

#include <cstdint>

#include "../unstructured/strips.h"
#include "layout.h"

namespace sparse_backend::bitmask {

using Kernels = unstructured::StripKernels;
using UnitArgs = unstructured::StripArgs;
using unstructured::ExponentTable;
using unstructured::kUnitStrips;

// Tokens per call for larger batches: decoding is then a thirtieth of the work.
constexpr int kGemmTokens = 264;
// Integer sums are moved into floats at the latest after so many columns, before they overflow:
// 512 products of at most 127 * 32767.
constexpr int kFlushColumns = 512;
// Strips of a register tile.
constexpr int kMostTileStrips = 2;
// Bytes of a strip's decoded columns, 512 of 16-bit weights or 256 of 32-bit ones, and of the accumulators of
// all tokens: 128 for each in tiles of one strip, 64 in tiles of two.
constexpr int64_t kDecodedBytes = int64_t{kStripRows} * 1024;
constexpr int64_t kSavedBytes = int64_t{kGemmTokens} * 128;
constexpr int64_t kScratchBytes = kMostTileStrips * (kDecodedBytes + 64) + 2 * kSavedBytes;

const Kernels& scalar_kernels(Values values);
#if defined(__x86_64__)
const Kernels& avx2_kernels(Values values);
const Kernels& avx512_kernels(Values values);
const Kernels& avx512_bf16_kernels(Values values);  // bf16 values and activations, vdpbf16ps
const Kernels& avx512_byte_kernels(Values values);  // integer values and int8 activations, vpdpbusd
const Kernels& amx_kernels(Values values);          // tiles; all but fp16, bf16 values with bf16 activations
const Kernels& amx_byte_kernels(Values values);     // integer values and int8 activations
#endif

}  // namespace sparse_backend::bitmask

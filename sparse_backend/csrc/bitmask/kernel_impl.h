// The bitmask kernels, written once over a `Simd` policy that each instruction set's
// file defines. A policy has:
//
//   kBlock        columns decoded at once (divides 64)
//   kParts        multiply-add operands a decoded block fills
//   Element       type of the prepared activations and of decoded scratch
//   kElements     Elements in one operand (kBlock == kParts * kElements)
//   Operand, Accumulator
//   kGemvTokens   batches up to this size decode into registers
//   kGemmTile     tokens in the register tile of the batched kernel
//   rows_at_once(tokens)   rows of a panel that the accumulators have room for
//   Masks         a chunk's masks in the form decode() wants them (MaskWords will do)
//   decode(masks, row, block, values, out)   expands one block; advances `values`
//   load, store, zero, multiply_add, reduce, prepare_block
//
// Every output is one accumulator filled block by block, part by part, and reduced at
// the end, in `gemv` and `gemm` alike: a row's result does not depend on the batch it is
// computed in, on the number of threads, or on the machine's load.
#pragma once

#include "kernels.h"
#include "layout.h"

namespace sparse_backend::bitmask {
namespace {

// How far ahead of the decoder memory is asked for, in bytes of stream. One thread alone
// needs it to reach the memory's limit; see benchmarks/results for the distances tried.
constexpr int kPrefetchBytes = 2048;

// The masks of a chunk as they are: what most policies decode from.
struct MaskWords {
  uint64_t mask[kPanelRows];
  inline void read(const uint8_t* masks) { std::memcpy(mask, masks, sizeof(mask)); }
};

template <class Simd>
struct Chunk {
  typename Simd::Masks masks;
  const uint16_t* values[kPanelRows];  // of each row; decode() moves them on

  // Reads the chunk at `stream` and returns where the next one starts.
  inline const uint8_t* read(const uint8_t* stream) {
    masks.read(stream);
    const uint8_t* next = stream + kPanelRows * sizeof(uint64_t);
    for (int row = 0; row < kPanelRows; ++row) {
      uint64_t mask;
      std::memcpy(&mask, stream + row * sizeof(mask), sizeof(mask));
      values[row] = reinterpret_cast<const uint16_t*>(next);
      next += 2 * __builtin_popcountll(mask);
    }
    return next;
  }

  inline void prefetch() const {
    for (int row = 0; row < kPanelRows; ++row) {
      __builtin_prefetch(reinterpret_cast<const uint8_t*>(values[row]) + kPrefetchBytes);
    }
  }
};

// Rows [kFirst, kFirst + kRows) of one panel times kTokens tokens.
template <class Simd, int kTokens, int kFirst, int kRows>
void gemv_rows(const UnitArgs& args, int panel) {
  using Element = typename Simd::Element;
  constexpr int kBlocks = kChunk / Simd::kBlock;
  typename Simd::Accumulator acc[kRows][kTokens];
  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < kTokens; ++t) acc[r][t] = Simd::zero();
  }
  const uint8_t* stream = args.panel[panel];
  const uint8_t* x = static_cast<const uint8_t*>(args.x);
  for (int64_t c = 0; c < args.chunks; ++c) {
    Chunk<Simd> chunk;
    stream = chunk.read(stream);
    if (kFirst == 0) chunk.prefetch();
#pragma GCC unroll 8
    for (int b = 0; b < kBlocks; ++b) {
      typename Simd::Operand weight[kRows][Simd::kParts];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        Simd::decode(chunk.masks, kFirst + r, b, chunk.values[kFirst + r], weight[r]);
      }
#pragma GCC unroll 2
      for (int part = 0; part < Simd::kParts; ++part) {
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t) {
          const Element* xt = reinterpret_cast<const Element*>(x + t * args.x_stride);
          const auto xv = Simd::load(xt + b * Simd::kBlock + part * Simd::kElements);
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            acc[r][t] = Simd::multiply_add(weight[r][part], xv, acc[r][t]);
          }
        }
      }
    }
    x += kChunk * sizeof(Element);
  }
  for (int t = 0; t < kTokens; ++t) {
    for (int r = 0; r < kRows; ++r) {
      args.out[t * kUnitRows + panel * kPanelRows + kFirst + r] = Simd::reduce(acc[r][t]);
    }
  }
}

template <class Simd, int kTokens>
void gemv_tokens(const UnitArgs& args) {
  constexpr int kRows = Simd::rows_at_once(kTokens);
  static_assert(kRows == 4 || kRows == 2 || kRows == 1, "a panel has four rows");
  for (int panel = 0; panel < args.panels; ++panel) {
    // The second and later passes over a panel find it in the L1 or L2 cache.
    gemv_rows<Simd, kTokens, 0, kRows>(args, panel);
    if constexpr (kRows == 2) gemv_rows<Simd, kTokens, 2, 2>(args, panel);
    if constexpr (kRows == 1) {
      gemv_rows<Simd, kTokens, 1, 1>(args, panel);
      gemv_rows<Simd, kTokens, 2, 1>(args, panel);
      gemv_rows<Simd, kTokens, 3, 1>(args, panel);
    }
  }
}

template <class Simd, int kTokens = 1>
void gemv(const UnitArgs& args) {
  if (args.tokens == kTokens) return gemv_tokens<Simd, kTokens>(args);
  if constexpr (kTokens < Simd::kGemvTokens) gemv<Simd, kTokens + 1>(args);
}

// Decodes `chunks` chunks of one panel to out[row][kGemmColumns]; returns the stream's new place.
template <class Simd>
const uint8_t* decode_panel(const uint8_t* stream, int64_t chunks, typename Simd::Element* out) {
  for (int64_t c = 0; c < chunks; ++c) {
    Chunk<Simd> chunk;
    stream = chunk.read(stream);
    chunk.prefetch();
    for (int r = 0; r < kPanelRows; ++r) {
      typename Simd::Element* row = out + r * kGemmColumns + c * kChunk;
#pragma GCC unroll 8
      for (int b = 0; b < kChunk / Simd::kBlock; ++b) {
        typename Simd::Operand weight[Simd::kParts];
        Simd::decode(chunk.masks, r, b, chunk.values[r], weight);
#pragma GCC unroll 2
        for (int part = 0; part < Simd::kParts; ++part) {
          Simd::store(row + b * Simd::kBlock + part * Simd::kElements, weight[part]);
        }
      }
    }
  }
  return stream;
}

// One panel of decoded weights times kTokens tokens, continuing the accumulators in `acc`
// ([token][row] vectors).
template <class Simd, int kTokens>
void gemm_tile(const typename Simd::Element* weights, const uint8_t* x, int64_t x_stride, int64_t steps,
               typename Simd::Accumulator* saved) {
  using Element = typename Simd::Element;
  typename Simd::Accumulator acc[kPanelRows][kTokens];
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 4
    for (int r = 0; r < kPanelRows; ++r) acc[r][t] = saved[t * kUnitRows + r];
  }
  for (int64_t s = 0; s < steps; ++s) {
    typename Simd::Operand xv[kTokens];
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      xv[t] = Simd::load(reinterpret_cast<const Element*>(x + t * x_stride) + s * Simd::kElements);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kPanelRows; ++r) {
      const auto w = Simd::load(weights + r * kGemmColumns + s * Simd::kElements);
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) acc[r][t] = Simd::multiply_add(w, xv[t], acc[r][t]);
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 4
    for (int r = 0; r < kPanelRows; ++r) saved[t * kUnitRows + r] = acc[r][t];
  }
}

// gemm_tile with `tokens`, at most kTokens, as the template argument.
template <class Simd, int kTokens>
void gemm_tokens(int tokens, const typename Simd::Element* weights, const uint8_t* x, int64_t x_stride,
                 int64_t steps, typename Simd::Accumulator* saved) {
  if (tokens == kTokens) return gemm_tile<Simd, kTokens>(weights, x, x_stride, steps, saved);
  if constexpr (kTokens > 1) gemm_tokens<Simd, kTokens - 1>(tokens, weights, x, x_stride, steps, saved);
}

template <class Simd>
void gemm(const UnitArgs& args) {
  using Element = typename Simd::Element;
  using Accumulator = typename Simd::Accumulator;
  Accumulator* saved = static_cast<Accumulator*>(args.scratch);
  Element* decoded = reinterpret_cast<Element*>(saved + kUnitRows * kGemmTokens);
  const int vectors = args.tokens * kUnitRows;
  for (int i = 0; i < vectors; ++i) saved[i] = Simd::zero();

  const uint8_t* stream[kUnitPanels];
  for (int panel = 0; panel < args.panels; ++panel) stream[panel] = args.panel[panel];

  constexpr int64_t kStepChunks = kGemmColumns / kChunk;
  for (int64_t c = 0; c < args.chunks; c += kStepChunks) {
    const int64_t chunks = args.chunks - c < kStepChunks ? args.chunks - c : kStepChunks;
    const int64_t steps = chunks * kChunk / Simd::kElements;
    for (int panel = 0; panel < args.panels; ++panel) {
      stream[panel] = decode_panel<Simd>(stream[panel], chunks, decoded + panel * kPanelRows * kGemmColumns);
    }
    const uint8_t* x = static_cast<const uint8_t*>(args.x) + c * kChunk * sizeof(Element);
    for (int t = 0; t < args.tokens; t += Simd::kGemmTile) {
      const int tokens = args.tokens - t < Simd::kGemmTile ? args.tokens - t : Simd::kGemmTile;
      for (int panel = 0; panel < args.panels; ++panel) {
        const Element* weights = decoded + panel * kPanelRows * kGemmColumns;
        Accumulator* acc = saved + t * kUnitRows + panel * kPanelRows;
        gemm_tokens<Simd, Simd::kGemmTile>(tokens, weights, x + t * args.x_stride, args.x_stride, steps, acc);
      }
    }
  }
  for (int t = 0; t < args.tokens; ++t) {
    for (int r = 0; r < args.panels * kPanelRows; ++r) {
      args.out[t * kUnitRows + r] = Simd::reduce(saved[t * kUnitRows + r]);
    }
  }
}

template <class Simd>
void prepare(const void* x, DType dtype, int64_t k, void* out) {
  using Element = typename Simd::Element;
  Element* dst = static_cast<Element*>(out);
  const int64_t padded = round_up(k, kChunk);
  const int64_t full = k / Simd::kBlock * Simd::kBlock;
  const int64_t element_bytes = dtype == DType::kFp32 ? 4 : 2;
  const uint8_t* src = static_cast<const uint8_t*>(x);
  for (int64_t i = 0; i < full; i += Simd::kBlock) {
    Simd::prepare_block(src + i * element_bytes, dtype, dst + i);
  }
  if (full == padded) return;
  float tail[Simd::kBlock] = {};  // the last, partial block, as floats and zero-padded
  for (int64_t i = full; i < k; ++i) tail[i - full] = load_as_float(x, dtype, i);
  Simd::prepare_block(reinterpret_cast<const uint8_t*>(tail), DType::kFp32, dst + full);
  for (int64_t i = full + Simd::kBlock; i < padded; ++i) dst[i] = Element(0);
}

template <class Simd>
constexpr Kernels make_kernels(const char* name) {
  return Kernels{name,      sizeof(typename Simd::Element), Simd::kGemvTokens, prepare<Simd>, gemv<Simd>,
                 gemm<Simd>};
}

}  // namespace
}  // namespace sparse_backend::bitmask

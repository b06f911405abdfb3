// The bitmask kernels, written once over a `Simd` policy that each instruction set's
// file defines. A policy has:
//
//   kValues        what it reads; Decoder: how runs become words (unstructured/decode_*.h)
//   Stored        a value as decode() reads it: uint16_t, or for integers uint8_t
//   kBlock        columns decoded at once (divides 64)
//   kParts        multiply-add operands a decoded block fills
//   Element       type of the prepared activations and of decoded scratch
//   kElements     Elements in one operand (kBlock == kParts * kElements)
//   Operand, Accumulator
//   kGemvTokens   batches up to this size decode into registers
//   kGemmTile     tokens in the register tile of the batched kernel
//   rows_at_once(tokens)   rows of a panel that the accumulators have room for
//   Masks         a chunk's masks in the form decode() wants them (MaskWords will do)
//   decode(masks, row, block, words, out)   expands one block; advances `words`
//   load, store, zero, multiply_add, reduce, prepare_block
//   for integer values: Sum, zero_sum(), add_scaled(sum, accumulator, scale), reduce(sum)
//
// Every output is one accumulator filled block by block, part by part, and reduced at
// the end, in `gemv` and `gemm` alike: a row's result does not depend on the batch it is
// computed in, on the number of threads, or on the machine's load. Integer accumulators are
// moved into floats at the same columns in both.
#pragma once

#include "../unstructured/quantise.h"
#include "kernels.h"

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
  const typename Simd::Stored* values[kPanelRows];  // of each row; decode() moves them on

  const uint8_t* ahead;  // what to prefetch, a quarter with each row
  int64_t quarter;

  // One at a time, between the rows' work: a burst of prefetches would wait for each other, and the
  // loads of this chunk for them.
  inline void prefetch(int row) const { __builtin_prefetch(ahead + row * quarter); }

  // Reads the chunk at `stream` and returns where the next one starts. `words` is where coded
  // runs are decoded to (kChunkWords), at least `least` values of them.
  inline const uint8_t* read(const uint8_t* stream, const ExponentTable& table, int64_t least,
                             uint16_t* words) {
    masks.read(stream);
    int64_t counts[kPanelRows], total = 0;
    for (int row = 0; row < kPanelRows; ++row) {
      uint64_t mask;
      std::memcpy(&mask, stream + row * sizeof(mask), sizeof(mask));
      counts[row] = __builtin_popcountll(mask);
      total += counts[row];
    }
    const uint8_t* run = stream + kPanelRows * sizeof(uint64_t);
    const uint8_t* next = run + unstructured::run_bytes(Simd::kValues, total);
    using Stored = typename Simd::Stored;
    const Stored* at = reinterpret_cast<const Stored*>(run);
    if constexpr (!Simd::Decoder::template plain<Simd::kValues>()) {
      at = reinterpret_cast<const Stored*>(words);
      Simd::Decoder::template decode<Simd::kValues>(run, total, least, table, words);
    }
    for (int row = 0; row < kPanelRows; ++row) {
      values[row] = at;
      at += counts[row];
    }
    ahead = stream + kPrefetchBytes;
    quarter = (next - stream) / kPanelRows;
    return next;
  }
};

// Where the parts of a unit's scratch memory are.
template <class Simd>
struct Memory {
  using Accumulator = typename Simd::Accumulator;
  static constexpr int64_t kVectors = int64_t{kUnitRows} * kGemmTokens;
  uint8_t* base;
  Accumulator* accumulators() const { return reinterpret_cast<Accumulator*>(base); }
  void* sums() const { return base + kVectors * 64; }
  typename Simd::Element* decoded() const {
    return reinterpret_cast<typename Simd::Element*>(base + 2 * kVectors * 64);
  }
  uint16_t* words(int panel) const {
    return reinterpret_cast<uint16_t*>(base + 2 * kVectors * 64 + int64_t{kUnitRows} * kGemmColumns * 4) +
           panel * kChunkWords;
  }
};

// The unit's accumulators, [token][row of the unit], and for integer values their sums.
template <class Simd>
class Totals {
 public:
  using Accumulator = typename Simd::Accumulator;
  Totals(const UnitArgs& args, const Memory<Simd>& memory)
      : args_(args), accumulators_(memory.accumulators()), memory_(memory) {
    const int vectors = args.tokens * kUnitRows;
    for (int i = 0; i < vectors; ++i) accumulators_[i] = Simd::zero();
    if constexpr (kInteger) {
      for (int i = 0; i < vectors; ++i) sums()[i] = Simd::zero_sum();
    }
  }

  Accumulator* accumulators() const { return accumulators_; }
  auto* sums() const { return static_cast<typename Simd::Sum*>(memory_.sums()); }

  // To be called after every `step` chunks that end with chunk number `done`.
  inline void flush(int64_t done) {
    if constexpr (kInteger) {
      const int64_t period = args_.group_chunks > 0 ? args_.group_chunks : kFlushColumns / kChunk;
      if (done % period != 0 && done != args_.chunks) return;
      const int64_t group = args_.group_chunks > 0 ? (done - 1) / args_.group_chunks : 0;
      const float* scales = args_.scales + group * args_.scale_stride;
      for (int t = 0; t < args_.tokens; ++t) {
        for (int r = 0; r < args_.rows; ++r) {
          const int i = t * kUnitRows + r;
          sums()[i] = Simd::add_scaled(sums()[i], accumulators_[i], scales[r]);
          accumulators_[i] = Simd::zero();
        }
      }
    }
  }

  void write() const {
    for (int t = 0; t < args_.tokens; ++t) {
      for (int r = 0; r < args_.rows; ++r) {
        const int i = t * kUnitRows + r;
        if constexpr (kInteger) {
          args_.out[i] = Simd::reduce(sums()[i]);
        } else {
          args_.out[i] = Simd::reduce(accumulators_[i]);
        }
      }
    }
  }

 private:
  static constexpr bool kInteger = unstructured::is_integer(Simd::kValues);
  const UnitArgs& args_;
  Accumulator* accumulators_;
  Memory<Simd> memory_;
};

// Rows [kFirst, kFirst + kRows) of one chunk of a panel times kTokens tokens, added to `saved`
// ([token][row of the unit], from the panel's first row on).
template <class Simd, int kTokens, int kFirst, int kRows>
inline void gemv_rows(Chunk<Simd>& chunk, const uint8_t* x, int64_t x_stride,
                      typename Simd::Accumulator* saved) {
  using Element = typename Simd::Element;
  constexpr int kBlocks = kChunk / Simd::kBlock;
  typename Simd::Accumulator acc[kRows][kTokens];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) acc[r][t] = saved[t * kUnitRows + kFirst + r];
  }
#pragma GCC unroll 8
  for (int b = 0; b < kBlocks; ++b) {
    typename Simd::Operand weight[kRows][Simd::kParts];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      Simd::decode(chunk.masks, kFirst + r, b, chunk.values[kFirst + r], weight[r]);
      if (b == 0) chunk.prefetch(kFirst + r);
    }
#pragma GCC unroll 2
    for (int part = 0; part < Simd::kParts; ++part) {
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) {
        const Element* xt = reinterpret_cast<const Element*>(x + t * x_stride);
        const auto xv = Simd::load(xt + b * Simd::kBlock + part * Simd::kElements);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) acc[r][t] = Simd::multiply_add(weight[r][part], xv, acc[r][t]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) saved[t * kUnitRows + kFirst + r] = acc[r][t];
  }
}

// The unit's panels take turns, chunk by chunk: memory delivers several streams faster than one.
template <class Simd, int kTokens>
void gemv_tokens(const UnitArgs& args) {
  constexpr int kRows = Simd::rows_at_once(kTokens);
  static_assert(kRows == 4 || kRows == 2 || kRows == 1, "a panel has four rows");
  const Memory<Simd> memory{static_cast<uint8_t*>(args.scratch)};
  Totals<Simd> totals(args, memory);
  const ExponentTable table = *args.exponents;
  const uint8_t* stream[kUnitPanels];
  for (int p = 0; p < args.panels; ++p) stream[p] = args.panel[p];
  const uint8_t* x = static_cast<const uint8_t*>(args.x);
  for (int64_t c = 0; c < args.chunks; ++c) {
    Chunk<Simd> chunk[kUnitPanels];
    for (int p = 0; p < args.panels; ++p) {
      stream[p] = chunk[p].read(stream[p], table, args.least_decoded, memory.words(p));
    }
    for (int p = 0; p < args.panels; ++p) {
      auto* saved = totals.accumulators() + p * kPanelRows;
      gemv_rows<Simd, kTokens, 0, kRows>(chunk[p], x, args.x_stride, saved);
      if constexpr (kRows == 2) gemv_rows<Simd, kTokens, 2, 2>(chunk[p], x, args.x_stride, saved);
      if constexpr (kRows == 1) {
        gemv_rows<Simd, kTokens, 1, 1>(chunk[p], x, args.x_stride, saved);
        gemv_rows<Simd, kTokens, 2, 1>(chunk[p], x, args.x_stride, saved);
        gemv_rows<Simd, kTokens, 3, 1>(chunk[p], x, args.x_stride, saved);
      }
    }
    x += kChunk * sizeof(typename Simd::Element);
    totals.flush(c + 1);
  }
  totals.write();
}

template <class Simd, int kTokens = 1>
void gemv(const UnitArgs& args) {
  if (args.tokens == kTokens) return gemv_tokens<Simd, kTokens>(args);
  if constexpr (kTokens < Simd::kGemvTokens) gemv<Simd, kTokens + 1>(args);
}

// Decodes `chunks` chunks of one panel to out[row][kGemmColumns]; returns the stream's new place.
template <class Simd>
const uint8_t* decode_panel(const uint8_t* stream, int64_t chunks, const ExponentTable& table, int64_t least,
                            uint16_t* words, typename Simd::Element* out) {
  for (int64_t c = 0; c < chunks; ++c) {
    Chunk<Simd> chunk;
    stream = chunk.read(stream, table, least, words);
    for (int r = 0; r < kPanelRows; ++r) {
      chunk.prefetch(r);
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

// Where a tile of the batched kernel begins and ends. Its accumulators go on in memory ...
template <class Simd>
struct GoOn {
  typename Simd::Accumulator* saved;  // [token][row of the unit], from the panel's first row on
  auto begin(int t, int r) const { return saved[t * kUnitRows + r]; }
  void end(int t, int r, typename Simd::Accumulator acc) const { saved[t * kUnitRows + r] = acc; }
};

// ... or, where the tile is a group of scales, are added to the sums at once.
template <class Simd>
struct AddGroup {
  typename Simd::Sum* sums;
  const float* scales;  // of the panel's rows
  auto begin(int, int) const { return Simd::zero(); }
  void end(int t, int r, typename Simd::Accumulator acc) const {
    sums[t * kUnitRows + r] = Simd::add_scaled(sums[t * kUnitRows + r], acc, scales[r]);
  }
};

// One panel of decoded weights times kTokens tokens.
template <class Simd, int kTokens, class Finish>
void gemm_tile(const typename Simd::Element* weights, const uint8_t* x, int64_t x_stride, int64_t steps,
               const Finish& finish) {
  using Element = typename Simd::Element;
  typename Simd::Accumulator acc[kPanelRows][kTokens];
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 4
    for (int r = 0; r < kPanelRows; ++r) acc[r][t] = finish.begin(t, r);
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
    for (int r = 0; r < kPanelRows; ++r) finish.end(t, r, acc[r][t]);
  }
}

// gemm_tile with `tokens`, at most kTokens, as the template argument.
template <class Simd, int kTokens, class Finish>
void gemm_tokens(int tokens, const typename Simd::Element* weights, const uint8_t* x, int64_t x_stride,
                 int64_t steps, const Finish& finish) {
  if (tokens == kTokens) return gemm_tile<Simd, kTokens>(weights, x, x_stride, steps, finish);
  if constexpr (kTokens > 1) gemm_tokens<Simd, kTokens - 1>(tokens, weights, x, x_stride, steps, finish);
}

template <class Simd>
void gemm(const UnitArgs& args) {
  using Element = typename Simd::Element;
  const Memory<Simd> memory{static_cast<uint8_t*>(args.scratch)};
  Totals<Simd> totals(args, memory);
  const ExponentTable table = *args.exponents;
  Element* decoded = memory.decoded();
  const uint8_t* stream[kUnitPanels];
  for (int panel = 0; panel < args.panels; ++panel) stream[panel] = args.panel[panel];

  // A step is a group of scales, or as many columns as there is room for.
  const bool groups = args.group_chunks > 0;
  const int64_t step_chunks = groups ? args.group_chunks : kGemmColumns / kChunk;
  for (int64_t c = 0; c < args.chunks; c += step_chunks) {
    const int64_t chunks = args.chunks - c < step_chunks ? args.chunks - c : step_chunks;
    const int64_t steps = chunks * kChunk / Simd::kElements;
    for (int panel = 0; panel < args.panels; ++panel) {
      stream[panel] = decode_panel<Simd>(stream[panel], chunks, table, args.least_decoded,
                                         memory.words(panel), decoded + panel * kPanelRows * kGemmColumns);
    }
    const uint8_t* x = static_cast<const uint8_t*>(args.x) + c * kChunk * sizeof(Element);
    for (int t = 0; t < args.tokens; t += Simd::kGemmTile) {
      const int tokens = args.tokens - t < Simd::kGemmTile ? args.tokens - t : Simd::kGemmTile;
      for (int panel = 0; panel < args.panels; ++panel) {
        const Element* weights = decoded + panel * kPanelRows * kGemmColumns;
        const int64_t at = t * kUnitRows + panel * kPanelRows;
        const uint8_t* xt = x + t * args.x_stride;
        if constexpr (unstructured::is_integer(Simd::kValues)) {
          if (groups) {
            const float* scales =
                args.scales + c / args.group_chunks * args.scale_stride + panel * kPanelRows;
            const AddGroup<Simd> finish{totals.sums() + at, scales};
            gemm_tokens<Simd, Simd::kGemmTile>(tokens, weights, xt, args.x_stride, steps, finish);
            continue;
          }
        }
        const GoOn<Simd> finish{totals.accumulators() + at};
        gemm_tokens<Simd, Simd::kGemmTile>(tokens, weights, xt, args.x_stride, steps, finish);
      }
    }
    if (!groups) totals.flush(c + chunks);
  }
  totals.write();
}

template <class Simd>
float prepare(const void* x, DType dtype, int64_t k, int limit, void* out) {
  using Element = typename Simd::Element;
  Element* dst = static_cast<Element*>(out);
  const int64_t padded = round_up(k, kChunk);
  if constexpr (unstructured::is_integer(Simd::kValues)) {
    return unstructured::quantise_int16(x, dtype, k, padded, limit, dst);
  } else {
    (void)limit;
    const int64_t full = k / Simd::kBlock * Simd::kBlock;
    const int64_t element_bytes = dtype == DType::kFp32 ? 4 : 2;
    const uint8_t* src = static_cast<const uint8_t*>(x);
    for (int64_t i = 0; i < full; i += Simd::kBlock) {
      Simd::prepare_block(src + i * element_bytes, dtype, dst + i);
    }
    if (full == padded) return 1.0F;
    float tail[Simd::kBlock] = {};  // the last, partial block, as floats and zero-padded
    for (int64_t i = full; i < k; ++i) tail[i - full] = load_as_float(x, dtype, i);
    Simd::prepare_block(reinterpret_cast<const uint8_t*>(tail), DType::kFp32, dst + full);
    for (int64_t i = full + Simd::kBlock; i < padded; ++i) dst[i] = Element(0);
    return 1.0F;
  }
}

template <class Simd>
constexpr Kernels make_kernels(const char* name) {
  return Kernels{name,      sizeof(typename Simd::Element), Simd::kGemvTokens, prepare<Simd>, gemv<Simd>,
                 gemm<Simd>};
}

// The row of a table of kernels that a kind of values takes: Floats for bf16, fp16 and coded bf16,
// Integers for int8 and int4.
template <template <Values> class Floats, template <Values> class Integers>
const Kernels& pick_kernels(Values values, const char* name) {
  static const Kernels table[] = {
      make_kernels<Floats<Values::kBf16>>(name), make_kernels<Floats<Values::kFp16>>(name),
      make_kernels<Floats<Values::kBf16x12>>(name), make_kernels<Integers<Values::kInt8>>(name),
      make_kernels<Integers<Values::kInt4>>(name)};
  return table[static_cast<int>(values)];
}

}  // namespace
}  // namespace sparse_backend::bitmask

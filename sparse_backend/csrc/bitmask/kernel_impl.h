// The bitmask kernels, written once over a `Simd` policy that each instruction set's
// file defines. A policy has:
//
//   kValues        what it reads; Table: what decoding needs, made of an ExponentTable
//   kOperands      multiply-add operands that a decoded mask fills, of kVectorBytes each
//   kSums          accumulators per strip and token; sum_of(o): which of them operand o goes to
//   Element        of the prepared activations; kReorder: groups of four columns stand as 0, 2, 1, 3
//   kBroadcasts    different activations that a mask's operands are multiplied by; operand o takes number
//                  o % kBroadcasts, of one token kUnitBytes
//   streams(tokens)  strips side by side that the registers have room for
//   kGemvTokens, kGemvTiles   batches up to so many tiles of so many tokens decode into registers
//   kTileStrips, kGemmTile, kTileStep   the register tile of the batched kernel (strips.h)
//   Operand, Accumulator
//   decode(masks, i, run, table, out)   mask i of a chunk and its run, which it moves past
//   broadcast(x)   what an operand is multiplied by
//   load, store, zero, multiply_add
//   Rows, rows(accumulators)   16 rows' totals; for floats store_rows(out, rows)
//   for integer values: Sums, no_sums(), add_scaled(sums, rows, scales), store_rows(out, sums)
//   kOffset        whether activations are larger than they should be: then of a strip
//                  offset_of(w, accumulator) adds up by how much too large its rows become, and
//                  minus(rows, accumulator) takes that off
//
// Every output's accumulators are filled mask by mask, operand by operand, and added at the end, in
// `gemv` and `gemm` alike: a row's result does not depend on the batch it is computed in, on the
// number of threads, or on the machine's load. Integer accumulators are moved into floats at the same
// columns in both.
#pragma once

#include "../unstructured/ahead.h"
#include "../unstructured/prepare_strips.h"
#include "../unstructured/unroll.h"
#include "kernels.h"

namespace sparse_backend::bitmask {
namespace {

using unstructured::Ahead;
using unstructured::each;

// How far ahead of the decoder memory is asked for, in bytes of each strip's stream. Zen 5, one thread, four
// strips, 50% zeros: nothing 31 GB/s, 1 KB 33, 2 KB 37, 4 KB 35.
constexpr int kPrefetchBytes = 2048;

template <class Simd>
constexpr bool kInteger = unstructured::is_integer(Simd::kValues);
template <class Simd>
constexpr int kMasks = kChunk / mask_columns(Simd::kValues);
// Of one token's activations: for one broadcast, and for a chunk.
template <class Simd>
constexpr int kUnitBytes =
    mask_columns(Simd::kValues) * static_cast<int>(sizeof(typename Simd::Element)) / Simd::kBroadcasts;
template <class Simd>
constexpr int kChunkBytes = kChunk * static_cast<int>(sizeof(typename Simd::Element));
template <class Simd>
constexpr int kDecodedMask = Simd::kOperands * Simd::kVectorBytes;

// A chunk's masks, and where the decoder is in its runs.
template <class Simd>
struct Chunk {
  const uint8_t* masks;
  const uint8_t* run;

  inline void begin(const uint8_t* stream, int64_t ahead) {
    masks = stream;
    run = stream + kMaskBytes;
    prefetch(masks, ahead);
    prefetch(masks + 64, ahead);
  }

  inline void decode(int i, const typename Simd::Table& table, int64_t ahead, typename Simd::Operand out[]) {
    // A line for as many masks as take about one where half of the weights are zero.
    constexpr int64_t kFull = unstructured::run_bytes(Simd::kValues, kChunkWeights / kMasks<Simd>);
    if (i % (kFull > 64 ? 1 : 128 / kFull) == 0) prefetch(run, ahead);
    Simd::decode(masks, i, run, table, out);
  }
};

// A unit, and where the parts of its scratch memory are.
template <class Simd>
struct Unit {
  const UnitArgs& args;
  const typename Simd::Table table;
  const int64_t chunks;
  explicit Unit(const UnitArgs& a)
      : args(a), table(*a.exponents), chunks((a.columns + kChunk - 1) / kChunk) {}

  // Of the strips of a tile, numbered from 0.
  uint8_t* decoded(int s) const { return static_cast<uint8_t*>(args.scratch) + s * kDecodedBytes; }
  // [strip of the tile][token][kSums]
  auto* accumulators(int s, int token) const {
    auto* all = reinterpret_cast<typename Simd::Accumulator*>(decoded(kMostTileStrips));
    return all + (s * kGemmTokens + token) * Simd::kSums;
  }
  auto* sums(int s, int token) const {
    auto* all = reinterpret_cast<typename Simd::Sums*>(decoded(kMostTileStrips) + kSavedBytes);
    return all + s * kGemmTokens + token;
  }
  float* out(int strip, int token) const { return args.out + (strip * args.tokens + token) * kStripRows; }
  const float* scales(int strip, int64_t chunk) const {
    const int64_t group = args.group_columns > 0 ? chunk * kChunk / args.group_columns : 0;
    return args.scales + strip * args.strip_scales + group * args.group_scales;
  }
  // By how much the rows of strip s of the tile are too large.
  auto& offset(int s) const {
    return *reinterpret_cast<typename Simd::Accumulator*>(decoded(kMostTileStrips) + 2 * kSavedBytes +
                                                          s * 64);
  }
  // Chunks whose integer sums share a scale and do not overflow.
  int64_t segment() const {
    if constexpr (!kInteger<Simd>) return chunks;
    const int64_t columns = args.group_columns;
    return (columns > 0 && columns < kFlushColumns ? columns : kFlushColumns) / kChunk;
  }
};

template <class Simd>
inline typename Simd::Rows with_offset(typename Simd::Rows rows, const typename Simd::Accumulator& offset) {
  if constexpr (Simd::kOffset) return Simd::minus(rows, offset);
  return rows;
}

// kTokens tokens times kStreams strips from number `strip` on.
template <class Simd, int kTokens, int kStreams>
void gemv_strips(const Unit<Simd>& unit, int strip) {
  using Accumulator = typename Simd::Accumulator;
  constexpr int kSums = Simd::kSums;
  const uint8_t* stream[kStreams];
  Accumulator acc[kStreams][kTokens][kSums];
  typename Simd::Sums sums[kStreams][kTokens];
  [[maybe_unused]] Accumulator offset[kStreams];
  each<kStreams>([&](auto s) SPARSE_BACKEND_INLINE {
    stream[s] = unit.args.strip[strip + s];
    each<kTokens>([&](auto t) SPARSE_BACKEND_INLINE { sums[s][t] = Simd::no_sums(); });
  });
  const uint8_t* x = unit.args.x;
  const int64_t segment = unit.segment();
  for (int64_t first = 0; first < unit.chunks; first += segment) {
    const int64_t end = first + segment < unit.chunks ? first + segment : unit.chunks;
    each<kStreams>([&](auto s) SPARSE_BACKEND_INLINE {
      offset[s] = Simd::zero();
      each<kTokens>([&](auto t) SPARSE_BACKEND_INLINE {
        each<kSums>([&](auto o) SPARSE_BACKEND_INLINE { acc[s][t][o] = Simd::zero(); });
      });
    });
    for (int64_t c = first; c < end; ++c, x += kChunkBytes<Simd> * kTokens) {
      Chunk<Simd> chunk[kStreams];
      each<kStreams>([&](auto s) SPARSE_BACKEND_INLINE { chunk[s].begin(stream[s], kPrefetchBytes); });
#pragma GCC unroll 4
      for (int i = 0; i < kMasks<Simd>; ++i) {
        each<kStreams>([&](auto s) SPARSE_BACKEND_INLINE {
          typename Simd::Operand w[Simd::kOperands];
          chunk[s].decode(i, unit.table, kPrefetchBytes, w);
          if constexpr (Simd::kOffset) offset[s] = Simd::offset_of(w[0], offset[s]);
          each<kTokens>([&](auto t) SPARSE_BACKEND_INLINE {
            each<Simd::kOperands>([&](auto o) SPARSE_BACKEND_INLINE {
              const int unit_of = (i * Simd::kBroadcasts + o % Simd::kBroadcasts) * kTokens + t;
              Accumulator& a = acc[s][t][Simd::sum_of(o)];
              a = Simd::multiply_add(w[o], Simd::broadcast(x + unit_of * kUnitBytes<Simd>), a);
            });
          });
        });
      }
      each<kStreams>([&](auto s) SPARSE_BACKEND_INLINE { stream[s] = chunk[s].run; });
    }
    each<kStreams>([&](auto s) SPARSE_BACKEND_INLINE {
      each<kTokens>([&](auto t) SPARSE_BACKEND_INLINE {
        if constexpr (kInteger<Simd>) {
          const auto rows = with_offset<Simd>(Simd::rows(acc[s][t]), offset[s]);
          sums[s][t] = Simd::add_scaled(sums[s][t], rows, unit.scales(strip + s, first));
        } else {
          Simd::store_rows(unit.out(strip + s, t), Simd::rows(acc[s][t]));
        }
      });
    });
  }
  if constexpr (kInteger<Simd>) {
    each<kStreams>([&](auto s) SPARSE_BACKEND_INLINE {
      each<kTokens>([&](auto t)
                        SPARSE_BACKEND_INLINE { Simd::store_rows(unit.out(strip + s, t), sums[s][t]); });
    });
  }
}

template <class Simd, int kTokens>
void gemv_tokens(const UnitArgs& args) {
  constexpr int kStreams = Simd::streams(kTokens);
  const Unit<Simd> unit(args);
  int strip = 0;
  for (; strip + kStreams <= args.strips; strip += kStreams) {
    gemv_strips<Simd, kTokens, kStreams>(unit, strip);
  }
  for (; strip < args.strips; ++strip) gemv_strips<Simd, kTokens, 1>(unit, strip);
}

template <class Simd, int kTokens = 1>
void gemv(const UnitArgs& args) {
  if (args.tokens == kTokens) return gemv_tokens<Simd, kTokens>(args);
  if constexpr (kTokens < Simd::kGemvTokens) gemv<Simd, kTokens + 1>(args);
}

// Decodes `chunks` chunks of kStreams strips side by side to [mask][operand]; moves the streams on. (One
// strip after the other takes 1.4 times as long: from a mask to the next there is one chain.)
template <class Simd, int kStreams>
void decode_chunks(const Unit<Simd>& unit, const uint8_t* stream[], int64_t chunks) {
  int64_t out = 0;
  [[maybe_unused]] typename Simd::Accumulator offset[kStreams];
#pragma GCC unroll 2
  for (int s = 0; Simd::kOffset && s < kStreams; ++s) offset[s] = unit.offset(s);
  for (int64_t c = 0; c < chunks; ++c) {
    Chunk<Simd> chunk[kStreams];
#pragma GCC unroll 2
    for (int s = 0; s < kStreams; ++s) chunk[s].begin(stream[s], kPrefetchBytes);
#pragma GCC unroll 4
    for (int i = 0; i < kMasks<Simd>; ++i, out += kDecodedMask<Simd>) {
#pragma GCC unroll 2
      for (int s = 0; s < kStreams; ++s) {
        typename Simd::Operand w[Simd::kOperands];
        chunk[s].decode(i, unit.table, kPrefetchBytes, w);
        if constexpr (Simd::kOffset) offset[s] = Simd::offset_of(w[0], offset[s]);
#pragma GCC unroll 8
        for (int o = 0; o < Simd::kOperands; ++o) {
          Simd::store(unit.decoded(s) + out + o * Simd::kVectorBytes, w[o]);
        }
      }
    }
#pragma GCC unroll 2
    for (int s = 0; s < kStreams; ++s) stream[s] = chunk[s].run;
  }
#pragma GCC unroll 2
  for (int s = 0; Simd::kOffset && s < kStreams; ++s) unit.offset(s) = offset[s];
}

// Decoded strips times kTokens tokens from `token` on, added to their accumulators.
template <class Simd, int kTokens>
void gemm_tile(const Unit<Simd>& unit, const Ahead<Simd::kTileStrips>& ahead, int token, const uint8_t* x,
               int64_t masks) {
  using Accumulator = typename Simd::Accumulator;
  constexpr int kStrips = Simd::kTileStrips, kSums = Simd::kSums;
  Accumulator acc[kStrips][kTokens][kSums];
  const uint8_t* weights[kStrips];
#pragma GCC unroll 2
  for (int s = 0; s < kStrips; ++s) {
    weights[s] = unit.decoded(s);
#pragma GCC unroll 12
    for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 4
      for (int o = 0; o < kSums; ++o) acc[s][t][o] = unit.accumulators(s, token + t)[o];
    }
  }
  for (int64_t i = 0; i < masks; ++i, x += kUnitBytes<Simd> * Simd::kBroadcasts * kTokens) {
    ahead.ask(i);
#pragma GCC unroll 8
    for (int o = 0; o < Simd::kOperands; ++o) {
      typename Simd::Operand w[kStrips];
#pragma GCC unroll 2
      for (int s = 0; s < kStrips; ++s) {
        w[s] = Simd::load(weights[s] + i * kDecodedMask<Simd> + o * Simd::kVectorBytes);
      }
#pragma GCC unroll 12
      for (int t = 0; t < kTokens; ++t) {
        const auto xv = Simd::broadcast(x + (o % Simd::kBroadcasts * kTokens + t) * kUnitBytes<Simd>);
#pragma GCC unroll 2
        for (int s = 0; s < kStrips; ++s) {
          Accumulator& a = acc[s][t][Simd::sum_of(o)];
          a = Simd::multiply_add(w[s], xv, a);
        }
      }
    }
  }
#pragma GCC unroll 2
  for (int s = 0; s < kStrips; ++s) {
#pragma GCC unroll 12
    for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 4
      for (int o = 0; o < kSums; ++o) unit.accumulators(s, token + t)[o] = acc[s][t][o];
    }
  }
}

// gemm_tile with `tokens`, at most kTokens, as the template argument.
template <class Simd, int kTokens>
void gemm_tokens(int tokens, const Unit<Simd>& unit, const Ahead<Simd::kTileStrips>& ahead, int token,
                 const uint8_t* x, int64_t masks) {
  if (tokens == kTokens) return gemm_tile<Simd, kTokens>(unit, ahead, token, x, masks);
  if constexpr (kTokens > Simd::kTileStep) {
    gemm_tokens<Simd, kTokens - Simd::kTileStep>(tokens, unit, ahead, token, x, masks);
  }
}

// `strips` (at most a tile's) strips from number `first` on times all tokens, so many columns at a time that
// what is decoded, a tile's activations and the accumulators stay in an L1 cache.
template <class Simd>
void gemm_strips(const Unit<Simd>& unit, int first, int strips) {
  const UnitArgs& args = unit.args;
  const int tokens = static_cast<int>(round_up(args.tokens, Simd::kTileStep));
  const uint8_t* stream[Simd::kTileStrips] = {};
  for (int s = 0; s < Simd::kTileStrips; ++s) {
    if (s < strips) {
      stream[s] = args.strip[first + s];
    } else {
      std::memset(unit.decoded(s), 0, kDecodedBytes);
    }
    unit.offset(s) = Simd::zero();
    for (int t = 0; t < tokens; ++t) {
      for (int o = 0; o < Simd::kSums; ++o) unit.accumulators(s, t)[o] = Simd::zero();
      if constexpr (kInteger<Simd>) *unit.sums(s, t) = Simd::no_sums();
    }
  }
  const int64_t segment = unit.segment();
  constexpr int64_t kMost = kDecodedBytes / (kMasks<Simd> * kDecodedMask<Simd>);
  const int64_t step = segment < kMost ? segment : kMost;
  for (int64_t c = 0; c < unit.chunks; c += step) {
    const int64_t chunks = unit.chunks - c < step ? unit.chunks - c : step;
    const uint8_t* from = stream[0];
    if (strips == Simd::kTileStrips) {
      decode_chunks<Simd, Simd::kTileStrips>(unit, stream, chunks);
    } else {
      decode_chunks<Simd, 1>(unit, stream, chunks);
    }
    // The next chunks, which are about as long.
    const int passes = (tokens + args.tile_tokens - 1) / args.tile_tokens;
    Ahead<Simd::kTileStrips> ahead(stream[0] - from, passes, chunks * kMasks<Simd>);
    for (int s = 0; s < Simd::kTileStrips; ++s) ahead.next[s] = stream[s < strips ? s : 0];
    for (int pass = 0; pass < passes; ++pass) {
      const int t = pass * args.tile_tokens;
      const int height = tokens - t < args.tile_tokens ? tokens - t : args.tile_tokens;
      const uint8_t* x = args.x + t * args.x_row_bytes + c * kChunkBytes<Simd> * height;
      ahead.start(pass);
      gemm_tokens<Simd, Simd::kGemmTile>(height, unit, ahead, t, x, chunks * kMasks<Simd>);
    }
    if constexpr (kInteger<Simd>) {
      if ((c + chunks) % segment != 0 && c + chunks != unit.chunks) continue;
      for (int s = 0; s < strips; ++s) {
        for (int t = 0; t < args.tokens; ++t) {
          auto* acc = unit.accumulators(s, t);
          const auto rows = with_offset<Simd>(Simd::rows(acc), unit.offset(s));
          *unit.sums(s, t) = Simd::add_scaled(*unit.sums(s, t), rows, unit.scales(first + s, c));
          for (int o = 0; o < Simd::kSums; ++o) acc[o] = Simd::zero();
        }
        unit.offset(s) = Simd::zero();
      }
    }
  }
  for (int s = 0; s < strips; ++s) {
    for (int t = 0; t < args.tokens; ++t) {
      if constexpr (kInteger<Simd>) {
        Simd::store_rows(unit.out(first + s, t), *unit.sums(s, t));
      } else {
        Simd::store_rows(unit.out(first + s, t), Simd::rows(unit.accumulators(s, t)));
      }
    }
  }
}

template <class Simd>
void gemm(const UnitArgs& args) {
  static_assert(kGemmTokens % Simd::kTileStep == 0 && Simd::kGemmTile % Simd::kTileStep == 0, "padded tiles");
  const Unit<Simd> unit(args);
  for (int s = 0; s < args.strips; s += Simd::kTileStrips) {
    gemm_strips(unit, s, args.strips - s < Simd::kTileStrips ? args.strips - s : Simd::kTileStrips);
  }
}

template <class Simd>
float prepare(const void* x, DType dtype, int64_t k, int limit, void* out) {
  using Element = typename Simd::Element;
  if constexpr (Simd::kOffset) return Simd::prepare(x, dtype, k, limit, out);
  const float scale = unstructured::prepare_activations<Element>(x, dtype, k, kChunk, limit, out);
  if constexpr (Simd::kReorder) {
    auto* to = static_cast<Element*>(out);
    for (int64_t i = 0; i < round_up(k, kChunk); i += 4) {
      const Element second = to[i + 1];
      to[i + 1] = to[i + 2];
      to[i + 2] = second;
    }
  }
  return scale;
}

template <class Simd>
constexpr Kernels make_kernels(const char* name) {
  static_assert(Simd::kTileStrips <= kMostTileStrips && sizeof(typename Simd::Accumulator) <= 64, "strips");
  static_assert(
      Simd::kSums * sizeof(typename Simd::Accumulator) * Simd::kTileStrips * kGemmTokens <= kSavedBytes,
      "accumulators");
  static_assert(sizeof(typename Simd::Sums) * Simd::kTileStrips * kGemmTokens <= kSavedBytes, "sums");
  static_assert(kDecodedBytes >= 256 / kChunk * kMasks<Simd> * kDecodedMask<Simd>,
                "the largest group of scales");
  Kernels k{};
  k.name = name;
  k.x_element_bytes = sizeof(typename Simd::Element);
  k.x_unit_bytes = kUnitBytes<Simd>;
  k.column_step = kChunk;
  k.gemv_tokens = Simd::kGemvTokens;
  k.gemv_tiles = Simd::kGemvTiles;
  k.wants_sums = false;
  k.scratch_bytes = kScratchBytes;
  k.prepare = prepare<Simd>;
  k.gemv = gemv<Simd>;
  k.gemm = {gemm<Simd>, kGemmTokens, Simd::kGemmTile, Simd::kTileStep};
  return k;
}

}  // namespace
}  // namespace sparse_backend::bitmask

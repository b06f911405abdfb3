// The lanes kernels, written once over a `Simd` policy that each instruction set's file defines:
//
//   kValues        what it reads
//   kSteps, kPer   decode() makes kPer operands of 16 rows; kSteps times per block
//   kParts         vectors an operand is made of
//   kSums          accumulators per output; operand i of a block goes to number i % kSums
//   kGemvTokens, kGemvTiles   batches up to so many tiles of so many tokens decode into registers
//   streams(tokens)  strips side by side that the registers have room for
//   kGemmTile      tokens in the register tile of the batched kernel
//   Element        of the prepared activations; an operand takes 4 bytes of them: one float, or a
//                  pair of int16 or bf16
//   Operand, Accumulator, Broadcast
//   kOffset        what stored integers are above their value; needs wants_sums
//   decode(run, step, exponents, out), load, store, zero, broadcast, multiply_add
//   add_sums(a, b); for integer values: Sum, zero_sum, add_scaled(sum, accumulator, scales)
//   store_floats(out, sum)
//
// An output's kSums accumulators are filled block by block, operand by operand, in `gemv` and `gemm`
// alike, and added at the end: results depend on neither batch nor threads. Integer accumulators are
// moved into floats at the same blocks in both.
#pragma once

#include <type_traits>

#include "../unstructured/prepare_strips.h"
#include "kernels.h"

namespace sparse_backend::lanes {
namespace {

// How far ahead of the decoder memory is asked for, in bytes of stream: together as much for one stream as
// for several, and of one that goes on into the strips that follow, so that it never starts cold.
constexpr int kPrefetchBytes = 2048, kOneStreamPrefetchBytes = 8192;

struct List {
  int count;
  const uint16_t* block;
  const uint8_t* runs;
  explicit List(const uint8_t* strip) {
    uint16_t last;
    std::memcpy(&last, strip, sizeof(last));
    count = last + 1;
    block = reinterpret_cast<const uint16_t*>(strip + sizeof(last));
    runs = strip + list_bytes(count);
  }
};

template <class Simd>
constexpr int64_t kRunBytes = unstructured::run_bytes(Simd::kValues, kBlockWeights);
template <class Simd>
constexpr bool kInteger = unstructured::is_integer(Simd::kValues);
template <class Simd>
constexpr int64_t kBlockBytes = kBlockColumns * int64_t{sizeof(typename Simd::Element)};

// As an integer: the place may be past the end of the weight, where no pointer may point.
inline void prefetch_at(const void* from, int64_t bytes) {
  __builtin_prefetch(
      reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(from) + static_cast<uintptr_t>(bytes)));
}

// Asks for what a step takes of the block that comes kAhead bytes later. Spread over the steps: a burst of
// prefetches would wait for each other, and the loads for them.
template <class Simd, int kStep, int kAhead>
inline void prefetch_step(const uint8_t* run) {
  constexpr int64_t kBytes = kRunBytes<Simd> / Simd::kSteps;
  constexpr int64_t kFirst = (kStep * kBytes + 63) / 64, kEnd = ((kStep + 1) * kBytes + 63) / 64;
#pragma GCC unroll 12
  for (int64_t line = kFirst; line < kEnd; ++line) {
    prefetch_at(run, kAhead + 64 * line);
  }
}

// The accumulators of kTokens tokens.
template <class Simd, int kTokens>
struct Tile {
  typename Simd::Accumulator acc[kTokens][Simd::kSums][Simd::kParts];

  inline void clear() {
#pragma GCC unroll 12
    for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 4
      for (int s = 0; s < Simd::kSums; ++s) {
#pragma GCC unroll 2
        for (int p = 0; p < Simd::kParts; ++p) acc[t][s][p] = Simd::zero();
      }
    }
  }

  // Operands [kFirst, kFirst + kCount) of a block times the activations at `x`.
  template <int kFirst, int kCount>
  inline void multiply(const typename Simd::Operand (*w)[Simd::kParts], const uint8_t* x) {
#pragma GCC unroll 4
    for (int o = 0; o < kCount; ++o) {
#pragma GCC unroll 12
      for (int t = 0; t < kTokens; ++t) {
        const auto xv = Simd::broadcast(x + 4 * ((kFirst + o) * kTokens + t));
#pragma GCC unroll 2
        for (int p = 0; p < Simd::kParts; ++p) {
          auto& a = acc[t][(kFirst + o) % Simd::kSums][p];
          a = Simd::multiply_add(w[o][p], xv, a);
        }
      }
    }
  }

  // One block from its run.
  template <int kAhead, int kStep = 0>
  inline void block(const uint8_t* run, const typename Simd::Table& table, const uint8_t* x) {
    typename Simd::Operand w[Simd::kPer][Simd::kParts];
    prefetch_step<Simd, kStep, kAhead>(run);
    Simd::template decode<kStep>(run, table, w);
    multiply<kStep * Simd::kPer, Simd::kPer>(w, x);
    if constexpr (kStep + 1 < Simd::kSteps) block<kAhead, kStep + 1>(run, table, x);
  }

  // Stored integers are kOffset too large: takes that times the activations off again.
  inline void take_offset(const int32_t* x_sums, int64_t stride) {
    if constexpr (Simd::kOffset != 0) {
#pragma GCC unroll 12
      for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 2
        for (int p = 0; p < Simd::kParts; ++p) {
          acc[t][0][p] = Simd::subtract(acc[t][0][p], x_sums[t * stride] * Simd::kOffset);
        }
      }
    }
  }

  inline auto total(int t, int p) const {
    auto sum = acc[t][0][p];
#pragma GCC unroll 4
    for (int s = 1; s < Simd::kSums; ++s) sum = Simd::add_sums(sum, acc[t][s][p]);
    return sum;
  }
};

// Of integer values: where the group of block number `b` of the list ends, and where its scales stand
// among the strip's.
struct Group {
  int end;
  int64_t scales;
};

inline Group group_at(const UnitArgs& args, const List& list, int b) {
  int end = list.count - b < kFlushBlocks ? list.count : b + kFlushBlocks;
  if (args.group_columns == 0) return {end, 0};
  const int64_t group = list.block[b] * int64_t{kBlockColumns} / args.group_columns;
  int i = b + 1;
  while (i < end && list.block[i] * int64_t{kBlockColumns} / args.group_columns == group) ++i;
  return {i, group * kStripRows};
}

// kStreams strips side by side, which store the same blocks: memory delivers several streams faster
// than one, and the activations are read once.
template <class Simd, int kTokens, int kStreams, int kAhead = kPrefetchBytes>
void gemv_strips(const UnitArgs& args, int strip) {
  const typename Simd::Table table(*args.exponents);
  const List list(args.strip[strip]);
  const uint8_t* run[kStreams];
  Tile<Simd, kTokens> tile[kStreams];
#pragma GCC unroll 4
  for (int s = 0; s < kStreams; ++s) {
    run[s] = args.strip[strip + s] + (list.runs - args.strip[strip]);
    tile[s].clear();
  }
  const auto blocks = [&](int b, int end) {
    for (; b < end; ++b) {
      const uint8_t* x = args.x + list.block[b] * kBlockBytes<Simd> * kTokens;
#pragma GCC unroll 4
      for (int s = 0; s < kStreams; ++s) {
        tile[s].template block<kAhead>(run[s], table, x);
        run[s] += kRunBytes<Simd>;
        if constexpr (Simd::kOffset != 0) tile[s].take_offset(args.x_sums + list.block[b], args.x_sum_stride);
      }
    }
  };
  const auto out = [&](int s, int t) { return args.out + ((strip + s) * args.tokens + t) * kStripRows; };
  if constexpr (kInteger<Simd>) {
    typename Simd::Sum sums[kStreams][kTokens][Simd::kParts];
    for (auto& stream : sums) {
      for (auto& token : stream) {
        for (auto& sum : token) sum = Simd::zero_sum();
      }
    }
    for (int b = 0; b < list.count;) {
      const Group group = group_at(args, list, b);
      blocks(b, group.end);
      b = group.end;
#pragma GCC unroll 4
      for (int s = 0; s < kStreams; ++s) {
        const float* scales = args.scales + (strip + s) * args.strip_scales + group.scales;
        // A stream of their own: those of the strips that come kStreams later.
        prefetch_at(scales, kStreams * args.strip_scales * int64_t{sizeof(float)});
#pragma GCC unroll 12
        for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 2
          for (int p = 0; p < Simd::kParts; ++p) {
            sums[s][t][p] = Simd::add_scaled(sums[s][t][p], tile[s].total(t, p), scales, p);
          }
        }
        tile[s].clear();
      }
    }
    for (int s = 0; s < kStreams; ++s) {
      for (int t = 0; t < kTokens; ++t) {
        for (int p = 0; p < Simd::kParts; ++p) Simd::store_floats(out(s, t), p, sums[s][t][p]);
      }
    }
  } else {
    blocks(0, list.count);
#pragma GCC unroll 4
    for (int s = 0; s < kStreams; ++s) {
      for (int t = 0; t < kTokens; ++t) {
        for (int p = 0; p < Simd::kParts; ++p) Simd::store_floats(out(s, t), p, tile[s].total(t, p));
      }
    }
  }
}

// Whether strips [first, first + count) store the same blocks, as those of a dense weight do.
inline bool same_blocks(const UnitArgs& args, int first, int count) {
  uint16_t last, other;
  std::memcpy(&last, args.strip[first], sizeof(last));
  for (int s = 1; s < count; ++s) {
    if (args.strip[first + s] == nullptr) return false;
    // The count before the list: a shorter one may end where the buffer ends.
    std::memcpy(&other, args.strip[first + s], sizeof(other));
    if (other != last) return false;
    if (std::memcmp(args.strip[first], args.strip[first + s], 2 * (int64_t{last} + 2)) != 0) return false;
  }
  return true;
}

template <class Simd, int kTokens>
void gemv_tokens(const UnitArgs& args) {
  constexpr int kStreams = Simd::streams(kTokens);
  int s = 0;
  while (s < args.strips) {
    if (args.strip[s] == nullptr) {  // stores nothing
      std::memset(args.out + s * args.tokens * kStripRows, 0, kTokens * kStripRows * sizeof(float));
      ++s;
    } else if (args.one_stream) {
      gemv_strips<Simd, kTokens, 1, kOneStreamPrefetchBytes>(args, s++);
    } else if (kStreams > 1 && s + kStreams <= args.strips && same_blocks(args, s, kStreams)) {
      gemv_strips<Simd, kTokens, kStreams>(args, s);
      s += kStreams;
    } else {
      gemv_strips<Simd, kTokens, 1>(args, s++);
    }
  }
}

template <class Simd, int kTokens = 1>
void gemv(const UnitArgs& args) {
  if (args.tokens == kTokens) return gemv_tokens<Simd, kTokens>(args);
  if constexpr (kTokens < Simd::kGemvTokens) gemv<Simd, kTokens + 1>(args);
}

// Operands of a block, decoded.
template <class Simd>
constexpr int kOperands = Simd::kSteps * Simd::kPer;

template <class Simd, int kStep = 0>
inline void decode_block(const uint8_t* run, const typename Simd::Table& table, uint8_t* out) {
  typename Simd::Operand w[Simd::kPer][Simd::kParts];
  prefetch_step<Simd, kStep, kPrefetchBytes>(run);
  Simd::template decode<kStep>(run, table, w);
#pragma GCC unroll 4
  for (int o = 0; o < Simd::kPer; ++o) {
#pragma GCC unroll 2
    for (int p = 0; p < Simd::kParts; ++p) {
      Simd::store(out + ((kStep * Simd::kPer + o) * Simd::kParts + p) * (64 / Simd::kParts), w[o][p]);
    }
  }
  if constexpr (kStep + 1 < Simd::kSteps) decode_block<Simd, kStep + 1>(run, table, out);
}

// What the batched kernel keeps in memory between chunks of blocks.
template <class Simd>
struct Memory {
  using Accumulator = typename Simd::Accumulator;
  uint8_t* base;
  uint8_t* decoded() const { return base; }
  Accumulator* accumulators() const {
    return reinterpret_cast<Accumulator*>(base + int64_t{kFlushBlocks} * kBlockWeights * 4);
  }
  auto* sums() const { return accumulators() + kGemmTokens * Simd::kSums * Simd::kParts; }
};

// Decoded blocks [b, end) of the list times kTokens tokens from `token` on.
template <class Simd, int kTokens>
void gemm_tile(const UnitArgs& args, const List& list, int b, int end, int token, const float* scales) {
  const Memory<Simd> memory{static_cast<uint8_t*>(args.scratch)};
  constexpr int kSaved = Simd::kSums * Simd::kParts;
  auto* saved = memory.accumulators() + token * kSaved;
  Tile<Simd, kTokens> tile;
  tile.clear();
  if constexpr (!kInteger<Simd>) {
#pragma GCC unroll 12
    for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 4
      for (int s = 0; s < Simd::kSums; ++s) {
#pragma GCC unroll 2
        for (int p = 0; p < Simd::kParts; ++p) tile.acc[t][s][p] = saved[t * kSaved + s * Simd::kParts + p];
      }
    }
  }
  const uint8_t* decoded = memory.decoded();
  const uint8_t* tile_x = args.x + token * args.x_row_bytes;
  for (int i = b; i < end; ++i, decoded += kOperands<Simd> * 64) {
    const uint8_t* x = tile_x + list.block[i] * kBlockBytes<Simd> * kTokens;
    // In fours, which are the same accumulators each time.
    static_assert(kOperands<Simd> % 4 == 0 && 4 % Simd::kSums == 0, "whole rounds");
    for (int o = 0; o < kOperands<Simd>; o += 4) {
      typename Simd::Operand w[4][Simd::kParts];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
#pragma GCC unroll 2
        for (int p = 0; p < Simd::kParts; ++p) {
          w[j][p] = Simd::load(decoded + ((o + j) * Simd::kParts + p) * (64 / Simd::kParts));
        }
      }
      tile.template multiply<0, 4>(w, x + 4 * o * kTokens);
    }
    if constexpr (Simd::kOffset != 0) {
      tile.take_offset(args.x_sums + token * args.x_sum_stride + list.block[i], args.x_sum_stride);
    }
  }
#pragma GCC unroll 12
  for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 2
    for (int p = 0; p < Simd::kParts; ++p) {
      if constexpr (kInteger<Simd>) {
        auto* sums = reinterpret_cast<typename Simd::Sum*>(memory.sums()) + (token + t) * Simd::kParts;
        sums[p] = Simd::add_scaled(sums[p], tile.total(t, p), scales, p);
      } else {
        (void)scales;
#pragma GCC unroll 4
        for (int s = 0; s < Simd::kSums; ++s) saved[t * kSaved + s * Simd::kParts + p] = tile.acc[t][s][p];
      }
    }
  }
}

template <class Simd, int kTokens>
void gemm_some(int tokens, const UnitArgs& args, const List& list, int b, int end, int token,
               const float* scales) {
  if (tokens == kTokens) return gemm_tile<Simd, kTokens>(args, list, b, end, token, scales);
  if constexpr (kTokens > 1) gemm_some<Simd, kTokens - 1>(tokens, args, list, b, end, token, scales);
}

template <class Simd>
void gemm_strip(const UnitArgs& args, int strip) {
  const List list(args.strip[strip]);
  const typename Simd::Table table(*args.exponents);
  const Memory<Simd> memory{static_cast<uint8_t*>(args.scratch)};
  constexpr int kSaved = Simd::kSums * Simd::kParts;
  for (int i = 0; i < args.tokens * kSaved; ++i) memory.accumulators()[i] = Simd::zero();
  using Stored = typename Simd::Sum;
  auto* sums = reinterpret_cast<Stored*>(memory.sums());
  if constexpr (kInteger<Simd>) {
    for (int i = 0; i < args.tokens * Simd::kParts; ++i) sums[i] = Simd::zero_sum();
  }
  const uint8_t* run = list.runs;
  const int height = args.tile_tokens;
  for (int b = 0; b < list.count;) {
    Group group{list.count - b < kChunkBlocks ? list.count : b + kChunkBlocks, 0};
    if constexpr (kInteger<Simd>) group = group_at(args, list, b);
    uint8_t* decoded = memory.decoded();
    for (int i = b; i < group.end; ++i, run += kRunBytes<Simd>, decoded += kOperands<Simd> * 64) {
      decode_block<Simd>(run, table, decoded);
    }
    for (int t = 0; t < args.tokens; t += height) {
      const int tokens = args.tokens - t < height ? args.tokens - t : height;
      gemm_some<Simd, Simd::kGemmTile>(tokens, args, list, b, group.end, t,
                                       args.scales + strip * args.strip_scales + group.scales);
    }
    b = group.end;
  }
  for (int t = 0; t < args.tokens; ++t) {
    float* out = args.out + (strip * args.tokens + t) * kStripRows;
    for (int p = 0; p < Simd::kParts; ++p) {
      if constexpr (kInteger<Simd>) {
        Simd::store_floats(out, p, sums[t * Simd::kParts + p]);
      } else {
        const auto* acc = memory.accumulators() + t * kSaved + p;
        auto sum = acc[0];
        for (int s = 1; s < Simd::kSums; ++s) sum = Simd::add_sums(sum, acc[s * Simd::kParts]);
        Simd::store_floats(out, p, sum);
      }
    }
  }
}

template <class Simd>
void gemm(const UnitArgs& args) {
  for (int s = 0; s < args.strips; ++s) {
    if (args.strip[s] != nullptr) {
      gemm_strip<Simd>(args, s);
    } else {
      std::memset(args.out + s * args.tokens * kStripRows, 0, args.tokens * kStripRows * sizeof(float));
    }
  }
}

template <class Simd>
float prepare(const void* x, DType dtype, int64_t k, int limit, void* out) {
  return unstructured::prepare_activations<typename Simd::Element>(x, dtype, k, kBlockColumns, limit, out);
}

template <class Simd>
constexpr Kernels make_kernels(const char* name) {
  Kernels k{};
  k.name = name;
  k.x_element_bytes = sizeof(typename Simd::Element);
  k.x_unit_bytes = 4;
  k.column_step = kBlockColumns;
  k.gemv_tokens = Simd::kGemvTokens;
  k.gemv_tiles = Simd::kGemvTiles;
  k.wants_sums = Simd::kOffset != 0;
  k.scratch_bytes = kScratchBytes;
  k.prepare = prepare<Simd>;
  k.gemv = gemv<Simd>;
  k.gemm = {gemm<Simd>, kGemmTokens, Simd::kGemmTile, 1};
  return k;
}

template <template <Values> class Floats, template <Values> class Integers>
const Kernels& pick_kernels(Values values, const char* name) {
  return unstructured::kernel_table<Floats, Integers>(
      values, [&](auto simd) { return make_kernels<decltype(simd)>(name); });
}

}  // namespace
}  // namespace sparse_backend::lanes

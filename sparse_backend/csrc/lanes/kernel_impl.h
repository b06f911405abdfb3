// The lanes kernels, written once over a `Simd` policy that each instruction set's file defines:
//
//   kValues        what it reads
//   kSteps, kPer   decode() makes kPer operands of 16 rows; kSteps times per block
//   kParts         vectors an operand is made of
//   kSums          accumulators per output; operand i of a block goes to number i % kSums
//   kGemvTokens, kGemvTiles   batches up to so many tiles of so many tokens decode into registers
//   streams(tokens)  strips side by side that the registers have room for
//   kTileStrips, kGemmTile, kGemmSums   strips and tokens in the register tile of the batched kernel, and
//                  accumulators per output: kSums but for integers, whose sums no order changes
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
#include "gemm_impl.h"

namespace sparse_backend::lanes {
namespace {

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
        prefetch(scales, kStreams * args.strip_scales * int64_t{sizeof(float)});
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

// The batched kernel over the policies of kernel_impl.h: blocks of columns are decoded into scratch memory,
// and a register tile of strips and tokens goes over that.
//
// Zen 5 broadcasts one activation a cycle and takes two dot products: tiles of two strips use each broadcast
// twice. 17408 x 5120, 64 tokens, one thread: see benchmarks/results/README.md.
#pragma once

#include "../unstructured/ahead.h"
#include "../unstructured/unroll.h"
#include "blocks.h"

namespace sparse_backend::lanes {
namespace {

using unstructured::Ahead;
using unstructured::each;

// Operands of a block, decoded, and how many blocks are decoded at a time.
template <class Simd>
constexpr int kOperands = Simd::kSteps * Simd::kPer;
template <class Simd>
constexpr int kGemmBlocks = kChunkBytes / (kOperands<Simd> * 64);

template <class Simd, int kStep = 0>
inline void decode_block(const uint8_t* run, const typename Simd::Table& table, uint8_t* out) {
  typename Simd::Operand w[Simd::kPer][Simd::kParts];
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

// kStrips strips from number `first` on, and what is kept of them in scratch memory.
template <class Simd, int kStrips>
struct Strips {
  using Accumulator = typename Simd::Accumulator;
  using Sum = typename Simd::Sum;
  static constexpr int kSums = Simd::kGemmSums, kParts = Simd::kParts;
  static_assert(kStrips <= kMostTileStrips && kSums * kParts * sizeof(Accumulator) <= kMostSums * 64,
                "scratch");
  const UnitArgs& args;
  int first;

  uint8_t* decoded(int s) const { return static_cast<uint8_t*>(args.scratch) + s * kDecodedBytes; }
  // [strip][token][kSums][kParts]
  Accumulator* accumulators(int s, int token) const {
    auto* all = reinterpret_cast<Accumulator*>(decoded(kMostTileStrips));
    return all + (s * kGemmTokens + token) * kSums * kParts;
  }
  // [strip][token][kParts]: of integers, what has been scaled.
  Sum* sums(int s, int token) const {
    auto* all =
        reinterpret_cast<Sum*>(decoded(kMostTileStrips) + kMostTileStrips * kGemmTokens * kMostSums * 64);
    return all + (s * kGemmTokens + token) * kParts;
  }
  const float* scales(int s, const Group& group) const {
    return args.scales + (first + s) * args.strip_scales + group.scales;
  }
  float* out(int s, int token) const { return args.out + ((first + s) * args.tokens + token) * kStripRows; }
};

// Decoded blocks [b, group.end) of the list times kTokens tokens from `token` on.
template <class Simd, int kStrips, int kTokens>
void gemm_tile(const Strips<Simd, kStrips>& strips, const List& list, int b, const Group& group,
               const Ahead<kStrips>& ahead, int token) {
  using Accumulator = typename Simd::Accumulator;
  constexpr int kSums = Simd::kGemmSums, kParts = Simd::kParts, kSaved = kSums * kParts;
  const UnitArgs& args = strips.args;
  Accumulator acc[kStrips][kTokens][kSaved];
  each<kStrips>([&](auto s) SPARSE_BACKEND_INLINE {
    each<kTokens>([&](auto t) SPARSE_BACKEND_INLINE {
      each<kSaved>([&](auto i) SPARSE_BACKEND_INLINE {
        acc[s][t][i] = kInteger<Simd> ? Simd::zero() : strips.accumulators(s, token + t)[i];
      });
    });
  });
  const uint8_t* tile_x = args.x + token * args.x_row_bytes;
  int64_t at = 0;
  for (int i = b; i < group.end; ++i) {
    ahead.ask(i - b);
    const uint8_t* x = tile_x + list.block[i] * kBlockBytes<Simd> * kTokens;
    static_assert(kOperands<Simd> % kSums == 0, "whole rounds");
    for (int o = 0; o < kOperands<Simd>; o += kSums) {
      each<kSums>([&](auto sum) SPARSE_BACKEND_INLINE {
        typename Simd::Operand w[kStrips][kParts];
        each<kStrips>([&](auto s) SPARSE_BACKEND_INLINE {
          each<kParts>([&](auto p) SPARSE_BACKEND_INLINE {
            w[s][p] = Simd::load(strips.decoded(s) + at + p * (64 / kParts));
          });
        });
        at += 64;
        each<kTokens>([&](auto t) SPARSE_BACKEND_INLINE {
          const auto xv = Simd::broadcast(x + 4 * ((o + sum) * kTokens + t));
          each<kStrips>([&](auto s) SPARSE_BACKEND_INLINE {
            each<kParts>([&](auto p) SPARSE_BACKEND_INLINE {
              auto& a = acc[s][t][sum * kParts + p];
              a = Simd::multiply_add(w[s][p], xv, a);
            });
          });
        });
      });
    }
  }
  // Stored integers are kOffset too large: takes that times the activations off again.
  int32_t offset[kTokens] = {};
  for (int i = b; Simd::kOffset != 0 && i < group.end; ++i) {
    for (int t = 0; t < kTokens; ++t)
      offset[t] += args.x_sums[(token + t) * args.x_sum_stride + list.block[i]];
  }
  each<kStrips>([&](auto s) SPARSE_BACKEND_INLINE {
    each<kTokens>([&](auto t) SPARSE_BACKEND_INLINE {
      if constexpr (kInteger<Simd>) {
        each<kParts>([&](auto p) SPARSE_BACKEND_INLINE {
          auto total = acc[s][t][p];
          for (int i = 1; i < kSums; ++i) total = Simd::add_sums(total, acc[s][t][i * kParts + p]);
          if constexpr (Simd::kOffset != 0) total = Simd::subtract(total, offset[t] * Simd::kOffset);
          auto& sum = strips.sums(s, token + t)[p];
          sum = Simd::add_scaled(sum, total, strips.scales(s, group), p);
        });
      } else {
        each<kSaved>([&](auto i)
                         SPARSE_BACKEND_INLINE { strips.accumulators(s, token + t)[i] = acc[s][t][i]; });
      }
    });
  });
}

// gemm_tile with `tokens`, at most kTokens, as the template argument.
template <class Simd, int kStrips, int kTokens>
void gemm_some(int tokens, const Strips<Simd, kStrips>& strips, const List& list, int b, const Group& group,
               const Ahead<kStrips>& ahead, int token) {
  if (tokens == kTokens) return gemm_tile<Simd, kStrips, kTokens>(strips, list, b, group, ahead, token);
  if constexpr (kTokens > 1) {
    gemm_some<Simd, kStrips, kTokens - 1>(tokens, strips, list, b, group, ahead, token);
  }
}

// Strips that store the same blocks times all tokens.
template <class Simd, int kStrips>
void gemm_strips(const UnitArgs& args, int first) {
  const Strips<Simd, kStrips> strips{args, first};
  const List list(args.strip[first]);
  const typename Simd::Table table(*args.exponents);
  constexpr int kSums = Simd::kGemmSums, kParts = Simd::kParts;
  const uint8_t* run[kStrips];
  for (int s = 0; s < kStrips; ++s) {
    run[s] = args.strip[first + s] + (list.runs - args.strip[first]);
    for (int t = 0; t < args.tokens; ++t) {
      for (int i = 0; i < kSums * kParts; ++i) strips.accumulators(s, t)[i] = Simd::zero();
      if constexpr (kInteger<Simd>) {
        for (int p = 0; p < kParts; ++p) strips.sums(s, t)[p] = Simd::zero_sum();
      }
    }
  }
  const int height = args.tile_tokens;
  for (int b = 0; b < list.count;) {
    Group group{list.count - b < kGemmBlocks<Simd> ? list.count : b + kGemmBlocks<Simd>, 0};
    if constexpr (kInteger<Simd>) group = group_at(args, list, b);
    for (int s = 0; s < kStrips; ++s) {
      uint8_t* decoded = strips.decoded(s);
      for (int i = b; i < group.end; ++i, run[s] += kRunBytes<Simd>, decoded += kOperands<Simd> * 64) {
        decode_block<Simd>(run[s], table, decoded);
      }
    }
    const int passes = (args.tokens + height - 1) / height;
    Ahead<kStrips> ahead((group.end - b) * kRunBytes<Simd>, passes, group.end - b);
    for (int s = 0; s < kStrips; ++s) ahead.next[s] = run[s];
    for (int pass = 0; pass < passes; ++pass) {
      const int t = pass * height, tokens = args.tokens - t < height ? args.tokens - t : height;
      ahead.start(pass);
      gemm_some<Simd, kStrips, Simd::kGemmTile>(tokens, strips, list, b, group, ahead, t);
    }
    b = group.end;
  }
  for (int s = 0; s < kStrips; ++s) {
    for (int t = 0; t < args.tokens; ++t) {
      for (int p = 0; p < kParts; ++p) {
        if constexpr (kInteger<Simd>) {
          Simd::store_floats(strips.out(s, t), p, strips.sums(s, t)[p]);
        } else {
          const auto* acc = strips.accumulators(s, t) + p;
          auto sum = acc[0];
          for (int i = 1; i < kSums; ++i) sum = Simd::add_sums(sum, acc[i * kParts]);
          Simd::store_floats(strips.out(s, t), p, sum);
        }
      }
    }
  }
}

template <class Simd>
void gemm(const UnitArgs& args) {
  constexpr int kStrips = Simd::kTileStrips;
  for (int s = 0; s < args.strips;) {
    if (args.strip[s] == nullptr) {  // stores nothing
      std::memset(args.out + s * args.tokens * kStripRows, 0, args.tokens * kStripRows * sizeof(float));
      ++s;
    } else if (kStrips > 1 && s + kStrips <= args.strips && same_blocks(args, s, kStrips)) {
      gemm_strips<Simd, kStrips>(args, s);
      s += kStrips;
    } else {
      gemm_strips<Simd, 1>(args, s++);
    }
  }
}

}  // namespace
}  // namespace sparse_backend::lanes

// The kernel of the level `amx` for all formats cut into strips of 16 rows, over a policy that decodes a
// format to tiles. A decoded operand, 16 rows by two columns of bf16 or four of int8, is a row of a B tile
// as it stands; 16 tokens' activations are an A tile. A policy has:
//
//   run(args)      a unit: run_unit<Policy>, mostly
//   kActivations   how activations stand in A tiles
//   kColumnStep    they are zero-padded to a multiple of so many columns, itself one of 64: what tiles reach
//   kPartStrips    strips in a part of the stream
//   kSmall, kLarge   tiles of a strip decoded at a time: for so few tokens that their sums stay in
//                  tiles (0: never), and for more
//   Strips<n>(args, first)   n strips side by side, in whose tiles the same columns stand:
//     tiles        of a strip
//     columns      of a tile: 32 of bf16, 64 of int8, or fewer
//     column(i)    first column of tile i
//     start(i, end, buffer)   tiles [i, end), which follow the ones before, are decoded next, to one of two
//                  buffers, slice by slice: slices() calls of slice()
//     tile(s, i, buffer)      where it put, or found, tile i of strip s
//     bytes(), next(s)        of a strip's stream: as many as were decoded last, and where it goes on after
//                             what start() announced
//     of integers: segment_end(i): the end of the tiles from i on that share a scale and do not
//       overflow; scales(s, i)
//   of integers: place_of(c)   where in a tile column c stands
//
// Sums of bf16 are rounded in another order than by vdpbf16ps, so one token runs here as well as hundreds
// (but of sell): a row's result does not depend on the batch. That costs a quarter of the speed at one and
// two tokens, and gains from four on. Integers are exact. 16-bit activations are split into two bytes,
// multiplied apart: the high one signed, the low one not.
//
// A step of four multiplications with activations from an L2 cache takes 37 ns on Emerald Rapids, of 28 that
// the multiplications need; with activations from farther away, 80. So all strips of a unit take their turn
// with one block of columns before the next, and the vector units decode what comes next meanwhile.
#pragma once

#include <optional>

#include "ahead.h"
#include "amx_product.h"
#include "prepare_strips.h"

namespace sparse_backend::unstructured::amx {
namespace {

// Tokens per call: what is decoded is then a small part of the work.
constexpr int kMostTokens = 256;

// What is done between multiplications: tiles are decoded that are multiplied next, and memory is asked for
// those after them; in equal shares.
template <class Strips, int kStrips>
class Meanwhile {
 public:
  // `decoded` decodes, if it is anything, and `asked` goes on in its stream then.
  Meanwhile(Strips* decoded, const Strips* asked, int64_t steps)
      : strips_(decoded),
        slices_(decoded != nullptr ? decoded->slices() : 0),
        share_((slices_ + steps - 1) / steps),
        ahead_(asked != nullptr ? asked->bytes() : 0, 1, steps) {
    for (int s = 0; s < kStrips; ++s) ahead_.next[s] = asked != nullptr ? asked->next(s) : nullptr;
    ahead_.start(0);
  }
  inline void operator()() {
    ahead_.ask(step_++);
    for (int64_t i = 0; i < share_ && slices_ > 0; ++i, --slices_) strips_->slice();
  }
  // What is left to decode.
  void finish() {
    for (; slices_ > 0; --slices_) strips_->slice();
  }

 private:
  Strips* strips_;
  int64_t slices_, share_, step_ = 0;
  Ahead<kStrips> ahead_;
};

constexpr int kMostGroups = kMostUnitStrips / 2;

// Groups of kStrips strips, from number `first` on, times all tokens, of which kX activation tiles at a time.
template <class Policy, int kStrips, int kX>
class Run {
 public:
  static constexpr int kAcross = kX / halves(Policy::kActivations);  // tiles of tokens
  static constexpr bool kInteger = Policy::kActivations != Activations::kBf16;
  using Strips = typename Policy::template Strips<kStrips>;

  Run(const StripArgs& args, int first, int groups) : args_(args), first_(first), groups_(groups) {
    for (int g = 0; g < groups; ++g) strips_[g].emplace(args, first + g * kStrips);
  }

  void operator()() {
    const int64_t tiles = strips_[0]->tiles;
    if (kInteger || tiles == 0) {
      std::memset(args_.out + first_ * int64_t{args_.tokens} * kStripRows, 0,
                  groups_ * kStrips * int64_t{args_.tokens} * kStripRows * sizeof(float));
    }
    const int step = kAcross * args_.tile_tokens, passes = (args_.tokens + step - 1) / step;
    if (tiles == 0) return;
    if constexpr (Policy::kSmall > 0) {
      if (passes == 1) {
        for (int g = 0; g < groups_; ++g) in_registers(g);
        return;
      }
    }
    block_by_block(step, passes);
  }

 private:
  int64_t end_of(int64_t i, int64_t most) const {
    const Strips& strips = *strips_[0];
    int64_t end = i + most < strips.tiles ? i + most : strips.tiles;
    if constexpr (kInteger) {
      const int64_t segment = strips.segment_end(i);
      if (segment < end) end = segment;
    }
    return end;
  }

  // Calls body(product) with as many tiles of tokens as there are from `token` on.
  template <class Body>
  inline void with_product(int group, int token, const Body& body) {
    const int first = first_ + group * kStrips;
    if (kAcross == 2 && args_.tokens - token <= args_.tile_tokens) {
      body(Product<Policy, kStrips, kX / kAcross>(args_, first, token));
    } else {
      body(Product<Policy, kStrips, kX>(args_, first, token));
    }
  }

  static void decode(Strips& strips, int64_t i, int64_t end, int buffer) {
    strips.start(i, end, buffer);
    for (int64_t slice = strips.slices(); slice > 0; --slice) strips.slice();
  }

  // All sums of a group stay in tiles, and its streams are read from end to end.
  void in_registers(int group) {
    Strips& strips = *strips_[group];
    with_product(group, 0, [&](const auto& product) {
      product.configure(strips.columns);
      product.zero();
      int64_t i = 0, end = end_of(0, Policy::kSmall);
      decode(strips, i, end, 0);
      for (int buffer = 0; i < strips.tiles; buffer = 1 - buffer) {
        const int64_t next = end < strips.tiles ? end_of(end, Policy::kSmall) : end;
        if (end < next) strips.start(end, next, 1 - buffer);
        Meanwhile<Strips, kStrips> meanwhile(end < next ? &strips : nullptr, nullptr, end - i);
        product.multiply(strips, i, end, buffer, meanwhile);
        if constexpr (kInteger) {
          if (end == strips.segment_end(i)) product.flush(strips, i);
        }
        i = end;
        end = next;
      }
      if (!kInteger) product.store_sums();
    });
  }

  void block_by_block(int step, int passes) {
    int configured = 0;  // tokens of the pass for which tiles have been configured
    const int64_t tiles = strips_[0]->tiles;
    int64_t end = end_of(0, Policy::kLarge);
    decode(*strips_[0], 0, end, 0);
    int buffer = 0;
    for (int64_t i = 0; i < tiles;) {
      const int64_t next_end = end < tiles ? end_of(end, Policy::kLarge) : end;
      for (int g = 0; g < groups_; ++g, buffer = 1 - buffer) {
        Strips* decoded = nullptr;
        if (g + 1 < groups_) {
          decoded = &*strips_[g + 1];
          decoded->start(i, end, 1 - buffer);
        } else if (end < next_end) {
          decoded = &*strips_[0];
          decoded->start(end, next_end, 1 - buffer);
        }
        Meanwhile<Strips, kStrips> meanwhile(decoded, &*strips_[(g + 2) % groups_], passes * (end - i));
        for (int pass = 0; pass < passes; ++pass) {
          with_product(g, pass * step, [&](const auto& product) {
            const int left = args_.tokens - pass * step, tokens = left < step ? left : step;
            if (tokens != configured) product.configure(strips_[g]->columns);
            configured = tokens;
            if (kInteger || i == 0) {
              product.zero();
            } else {
              product.load_sums();
            }
            product.multiply(*strips_[g], i, end, buffer, meanwhile);
            if constexpr (kInteger) {
              product.flush(*strips_[g], i);
            } else {
              product.store_sums();
            }
          });
        }
        meanwhile.finish();
      }
      i = end;
      end = next_end;
    }
  }

  const StripArgs& args_;
  int first_, groups_;
  std::optional<Strips> strips_[kMostGroups];
};

// Where decoded tiles stand in scratch memory: two buffers of kMost tiles of each strip.
template <int kStrips, int kMost>
class Buffers {
 public:
  explicit Buffers(void* scratch) : memory_(static_cast<uint8_t*>(scratch)) {}
  static constexpr int64_t kScratch = int64_t{2} * kStrips * kMost * tiles::kBytes;

  void begin(int buffer, int64_t tile) { first_[buffer] = tile; }
  uint8_t* tile(int s, int64_t i, int buffer) const {
    return memory_ + ((buffer * kStrips + s) * kMost + i - first_[buffer]) * tiles::kBytes;
  }

 private:
  uint8_t* memory_;
  int64_t first_[2] = {};
};

// The unit's strips: four at a time for one tile of tokens, pairs for more, single ones where
// same(first, count) says that they do not store the same columns.
template <class Policy, class Same>
void run_unit(const StripArgs& args, const Same& same) {
  constexpr bool kSplit = halves(Policy::kActivations) == 2;
  const bool one_tile = args.tokens <= args.tile_tokens;
  for (int s = 0; s < args.strips;) {
    if constexpr (!kSplit) {
      if (one_tile && s + 4 <= args.strips && same(s, 4)) {
        Run<Policy, 4, 1>(args, s, 1)();
        s += 4;
        continue;
      }
    }
    int pairs = 0;
    while (s + 2 * pairs + 2 <= args.strips && same(s, 2 * pairs + 2)) ++pairs;
    if (pairs > 0) {
      Run<Policy, 2, 2>(args, s, pairs)();
      s += 2 * pairs;
    } else {
      Run<Policy, 1, 2>(args, s, 1)();
      ++s;
    }
  }
  tiles::release();
}

// One token's activations, in units of the columns of a tile: 64 bytes, of 16-bit integers 64 low and 64
// high bytes.
template <class Policy>
float prepare(const void* x, DType dtype, int64_t k, int limit, void* out) {
  constexpr Activations kKind = Policy::kActivations;
  constexpr int kColumns = unit_columns(kKind);
  if constexpr (kKind == Activations::kBf16) {
    return prepare_activations<uint16_t>(x, dtype, k, Policy::kColumnStep, limit, out);
  } else {
    const float scale = prepare_activations<int16_t>(x, dtype, k, Policy::kColumnStep, limit, out);
    const auto* words = static_cast<const int16_t*>(out);
    auto* bytes = static_cast<uint8_t*>(out);
    for (int64_t i = 0; i < round_up(k, Policy::kColumnStep); i += kColumns) {
      int16_t unit[kColumns];
      std::memcpy(unit, words + i, sizeof(unit));
      uint8_t* to = bytes + i * halves(kKind);
      for (int c = 0; c < kColumns; ++c) {
        const int place = Policy::place_of(c);
        to[place] = static_cast<uint8_t>(unit[c]);
        if (kKind == Activations::kWords) to[kColumns + place] = static_cast<uint8_t>(unit[c] >> 8);
      }
    }
    return scale;
  }
}

template <class Policy>
constexpr StripKernels make_kernels() {
  constexpr Activations kKind = Policy::kActivations;
  constexpr int64_t kFour = Policy::template Strips<4>::kScratch, kTwo = Policy::template Strips<2>::kScratch;
  StripKernels k{};
  k.name = "amx";
  k.x_element_bytes = kKind == Activations::kBytes ? 1 : 2;
  k.x_unit_bytes = unit_bytes(kKind);
  k.column_step = Policy::kColumnStep;
  k.gemv_tokens = 0;  // `gemm` takes any number
  k.gemv_tiles = 0;
  k.wants_sums = false;
  k.scratch_bytes = kFour > kTwo ? kFour : kTwo;
  k.part_strips = Policy::kPartStrips;
  k.prepare = prepare<Policy>;
  k.gemv = nullptr;
  k.gemm = {Policy::run, kMostTokens, tiles::kRows, 1, kMostUnitStrips};
  return k;
}

// The kernels of each kind of values but fp16.
template <template <Values, Activations> class Policy>
const StripKernels& kernel_table(Values values) {
  static constexpr StripKernels bf16 = make_kernels<Policy<Values::kBf16, Activations::kBf16>>(),
                                coded = make_kernels<Policy<Values::kBf16x12, Activations::kBf16>>(),
                                int8 = make_kernels<Policy<Values::kInt8, Activations::kWords>>(),
                                int4 = make_kernels<Policy<Values::kInt4, Activations::kWords>>();
  switch (values) {
    case Values::kBf16:
      return bf16;
    case Values::kBf16x12:
      return coded;
    case Values::kInt8:
      return int8;
    default:
      return int4;
  }
}

// Those of integers with int8 activations.
template <template <Values, Activations> class Policy>
const StripKernels& byte_kernel_table(Values values) {
  static constexpr StripKernels int8 = make_kernels<Policy<Values::kInt8, Activations::kBytes>>(),
                                int4 = make_kernels<Policy<Values::kInt4, Activations::kBytes>>();
  return values == Values::kInt8 ? int8 : int4;
}

}  // namespace
}  // namespace sparse_backend::unstructured::amx

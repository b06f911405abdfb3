// AMX: neighbouring blocks of a strip are the rows of a tile, two of bf16 and four of integers; where
// the stored ones do not come in such groups, tiles are of fewer rows. Blocks of bf16 are tiles as they
// stand in the stream. Compiled with avx512.cpp's flags; the tiles are inline assembly.
#include "../unstructured/amx_impl.h"
#include "avx512_words.h"
#include "blocks.h"
#include "kernels.h"

namespace sparse_backend::lanes {
namespace {

namespace amx = unstructured::amx;
using amx::Activations;
using unstructured::each;

template <Values kKind>
constexpr int64_t kRun = unstructured::run_bytes(kKind, kBlockWeights);

// Words 0, 16, 1, 17 and so on.
struct Pairs {
  alignas(64) uint16_t word[32];
  constexpr Pairs() : word() {
    for (int i = 0; i < 32; ++i) word[i] = static_cast<uint16_t>(i / 2 + i % 2 * 16);
  }
};
constexpr Pairs kPairs;

// Blocks to rows of tiles.
template <Values kKind>
struct Decoder {
  static constexpr int kRows = kKind == Values::kInt8 || kKind == Values::kInt4 ? 4 : 8;  // of a block
  static constexpr int64_t kDecoded = kRows * int64_t{tiles::kRowBytes};
  const WordTable<kKind> table;
  explicit Decoder(const ExponentTable& exponents) : table(exponents) {}

  [[gnu::always_inline]] inline void block(const uint8_t* run, uint8_t* out) const {
    if constexpr (kKind == Values::kBf16x12) {
      each<4>([&](auto step) SPARSE_BACKEND_INLINE {
        ask<step, 4>(run);
        __m512i words[2];
        table.template words<step>(run, words);
        store(out, 2 * step, words[0]);
        store(out, 2 * step + 1, words[1]);
      });
    } else if constexpr (kKind == Values::kInt8) {
      // 16 rows of two columns, 16 rows of the next two: a row's four side by side.
      const __m512i pairs = _mm512_load_si512(kPairs.word);
      each<4>([&](auto row) SPARSE_BACKEND_INLINE {
        ask<row, 4>(run);
        store(out, row, _mm512_permutexvar_epi16(pairs, _mm512_loadu_si512(run + 64 * row)));
      });
    } else if constexpr (kKind == Values::kInt4) {
      // A row's eight columns are the low halves of four bytes, then the high ones: place_of().
      each<2>([&](auto line) SPARSE_BACKEND_INLINE {
        ask<line, 2>(run);
        const __m512i both = _mm512_loadu_si512(run + 64 * line), codes = table.exponents.codes;
        store(out, 2 * line, _mm512_permutexvar_epi8(both, codes));
        store(out, 2 * line + 1, _mm512_permutexvar_epi8(_mm512_srli_epi16(both, 4), codes));
      });
    } else {
      each<8>([&](auto row) SPARSE_BACKEND_INLINE { store(out, row, _mm512_loadu_si512(run + 64 * row)); });
    }
  }

 private:
  // Asks for a step's share of what a block takes, further on: a burst would wait for itself.
  template <int kStep, int kSteps>
  static inline void ask(const uint8_t* run) {
    constexpr int64_t kFirst = (kStep * kRun<kKind> / kSteps + 63) / 64;
    constexpr int64_t kEnd = ((kStep + 1) * kRun<kKind> / kSteps + 63) / 64;
#pragma GCC unroll 4
    for (int64_t line = kFirst; line < kEnd; ++line) prefetch(run, kPrefetchBytes + 64 * line);
  }
  static inline void store(uint8_t* out, int row, __m512i v) {
    _mm512_store_si512(out + row * tiles::kRowBytes, v);
  }
};

template <Values kKind, Activations kX>
struct Policy {
  static constexpr Activations kActivations = kX;
  static constexpr int kMostBlocks = amx::unit_columns(kX) / kBlockColumns;  // of a tile
  static constexpr int kSmall = kX == Activations::kBf16 ? 1 : 2;
  static constexpr int kLarge = kX == Activations::kBf16 ? 8 : kFlushBlocks;
  static constexpr int kColumnStep = 64, kPartStrips = 1;
  static constexpr int place_of(int column) {
    if (kKind != Values::kInt4) return column;
    // Of a row's eight columns the low halves are 0, 4, 1, 5 and the high ones 2, 6, 3, 7.
    const int c = column % 8, half = c % 4 / 2;
    return column / 8 * 8 + half * 4 + c % 2 * 2 + c / 4;
  }

  static void run(const UnitArgs& args) {
    // Runs of strips that store something.
    UnitArgs some = args;
    for (int s = 0; s < args.strips;) {
      some.out = args.out + s * int64_t{args.tokens} * kStripRows;
      some.scales = args.scales + s * args.strip_scales;
      some.strips = 0;
      for (; s < args.strips && args.strip[s] != nullptr; ++s) some.strip[some.strips++] = args.strip[s];
      if (some.strips > 0) {
        amx::run_unit<Policy>(some, [&](int first, int count) { return same_blocks(some, first, count); });
      }
      if (s < args.strips) {  // stores nothing
        std::memset(args.out + s * int64_t{args.tokens} * kStripRows, 0,
                    args.tokens * kStripRows * sizeof(float));
        ++s;
      }
    }
  }

  template <int kStrips>
  class Strips {
   public:
    Strips(const UnitArgs& args, int first)
        : args_(args),
          first_(first),
          list_(args.strip[first]),
          blocks_(blocks_of_a_tile()),
          decoder_(*args.exponents),
          buffers_(args.scratch) {
      tiles = (list_.count + blocks_ - 1) / blocks_;
      columns = blocks_ * kBlockColumns;
      for (int s = 0; s < kStrips; ++s) {
        runs_[s] = args.strip[first + s] + (list_.runs - args.strip[first]);
      }
    }

    int64_t tiles;
    int columns;

    int64_t column(int64_t i) const { return list_.block[i * blocks_] * int64_t{kBlockColumns}; }

    const uint8_t* tile(int s, int64_t i, int buffer) const {
      const uint8_t* run = runs_[s] + i * blocks_ * kRun<kKind>;
      return kKind == Values::kBf16 && whole(i) ? run : buffers_.tile(s, i, buffer);
    }
    int64_t bytes() const { return (end_ - first_tile_) * blocks_ * kRun<kKind>; }
    const uint8_t* next(int s) const { return runs_[s] + end_ * blocks_ * kRun<kKind>; }

    int64_t segment_end(int64_t i) const {
      const auto b = static_cast<int>(i * blocks_);
      const Group group = group_at(args_, list_, b);
      // Sums are moved where the other levels move them.
      const int flush = (b / kFlushBlocks + 1) * kFlushBlocks;
      const int end = args_.group_columns == 0 && flush < group.end ? flush : group.end;
      return (end + blocks_ - 1) / blocks_;
    }
    const float* scales(int s, int64_t i) const {
      return args_.scales + (first_ + s) * args_.strip_scales +
             group_at(args_, list_, static_cast<int>(i * blocks_)).scales;
    }

    void start(int64_t i, int64_t end, int buffer) {
      buffers_.begin(buffer, i);
      tile_ = first_tile_ = i;
      end_ = end;
      buffer_ = buffer;
    }
    int64_t slices() const { return end_ - first_tile_; }
    inline void slice() {
      if (kKind == Values::kBf16 && whole(tile_)) {
        ask(tile_);
      } else {
        decode_tile(tile_, buffer_);
      }
      ++tile_;
    }

   private:
    // The most whose groups all start at a multiple of so many and go on without gaps, but for the last of a
    // weight with a part of a tile too many.
    int blocks_of_a_tile() const {
      for (int n = kMostBlocks; n > 1; n /= 2) {
        const int64_t group = args_.group_columns;
        bool fits = group == 0 || group % (n * kBlockColumns) == 0;
        if (fits && list_.block[list_.count - 1] == list_.count - 1) return n;  // all are stored
        for (int b = 0; fits && b < list_.count; b += n) {
          fits = list_.block[b] % n == 0;
          const int last = b + n < list_.count ? b + n : list_.count;
          for (int i = b + 1; fits && i < last; ++i) fits = list_.block[i] == list_.block[i - 1] + 1;
        }
        if (fits) return n;
      }
      return 1;
    }

    bool whole(int64_t i) const { return (i + 1) * blocks_ <= list_.count; }

    inline void ask(int64_t i) const {
      const int64_t bytes = blocks_ * kRun<kKind>;
      for (int64_t line = 0; line < bytes; line += 64) {
        each<kStrips>([&](auto s)
                          SPARSE_BACKEND_INLINE { prefetch(runs_[s] + i * bytes, kPrefetchBytes + line); });
      }
    }

    inline void decode_tile(int64_t i, int buffer) {
      const int64_t first = i * blocks_, left = list_.count - first;
      const int64_t count = left < blocks_ ? left : blocks_;
      // Copies: members would be read again after every store, which may have changed them.
      const Decoder<kKind> decoder = decoder_;
      const uint8_t* run[kStrips];
      uint8_t* out[kStrips];
      each<kStrips>([&](auto s) SPARSE_BACKEND_INLINE {
        run[s] = runs_[s] + first * kRun<kKind>;
        out[s] = buffers_.tile(s, i, buffer);
      });
      for (int64_t b = 0; b < count; ++b) {
        each<kStrips>([&](auto s) SPARSE_BACKEND_INLINE {
          decoder.block(run[s] + b * kRun<kKind>, out[s] + b * Decoder<kKind>::kDecoded);
        });
      }
      for (int s = 0; count < blocks_ && s < kStrips; ++s) {
        std::memset(buffers_.tile(s, i, buffer) + count * Decoder<kKind>::kDecoded, 0,
                    (blocks_ - count) * Decoder<kKind>::kDecoded);
      }
    }

    static constexpr int kMost = kStrips == 4 ? kSmall : kLarge;

    const UnitArgs& args_;
    int first_;
    const List list_;
    const int64_t blocks_;  // of a tile
    const Decoder<kKind> decoder_;
    amx::Buffers<kStrips, kMost> buffers_;
    const uint8_t* runs_[kStrips];
    int64_t tile_ = 0, first_tile_ = 0, end_ = 0;
    int buffer_ = 0;

   public:
    static constexpr int64_t kScratch = amx::Buffers<kStrips, kMost>::kScratch;
  };
};

}  // namespace

const Kernels& amx_kernels(Values values) { return amx::kernel_table<Policy>(values); }
const Kernels& amx_byte_kernels(Values values) { return amx::byte_kernel_table<Policy>(values); }

}  // namespace sparse_backend::lanes

// AMX: an expanded mask of bf16, 16 rows of two columns, or of integers, 16 rows of four, is a row of a tile.
// Compiled with avx512.cpp's flags; the tiles are inline assembly.
#include "../unstructured/amx_impl.h"
#include "avx512_expand.h"
#include "kernels.h"

namespace sparse_backend::bitmask {
namespace {

namespace amx = unstructured::amx;
using amx::Activations;
using unstructured::each;

// How far ahead of the decoder memory is asked for, in bytes of each strip's stream.
constexpr int kPrefetchBytes = 2048;

template <Values kKind, Activations kX>
struct Policy {
  static constexpr Activations kActivations = kX;
  static constexpr int kColumns = amx::unit_columns(kX), kTilesOfChunk = kChunk / kColumns;
  static constexpr int kSmall = kTilesOfChunk,
                       kLarge = kX == Activations::kBf16 ? 8 : kFlushColumns / kColumns;
  static constexpr int kColumnStep = 64, kPartStrips = 1;
  static constexpr int place_of(int column) { return column; }

  static void run(const UnitArgs& args) {
    amx::run_unit<Policy>(args, [](int, int) { return true; });
  }

  template <int kStrips>
  class Strips {
   public:
    const int64_t tiles;
    static constexpr int columns = kColumns;

    Strips(const UnitArgs& args, int first)
        : tiles((args.columns + kChunk - 1) / kChunk * kTilesOfChunk),
          args_(args),
          first_(first),
          table_(*args.exponents),
          buffers_(args.scratch) {
      for (int s = 0; s < kStrips; ++s) stream_[s] = args.strip[first + s];
    }

    int64_t column(int64_t i) const { return i * kColumns; }
    const uint8_t* tile(int s, int64_t i, int buffer) const { return buffers_.tile(s, i, buffer); }
    int64_t bytes() const { return decoded_; }
    const uint8_t* next(int s) const { return stream_[s]; }

    int64_t segment_end(int64_t i) const {
      const int64_t group = args_.group_columns > 0 && args_.group_columns < kFlushColumns
                                ? args_.group_columns
                                : kFlushColumns;
      const int64_t end = (i * kColumns / group + 1) * group / kColumns;
      return end < tiles ? end : tiles;
    }
    const float* scales(int s, int64_t i) const {
      const int64_t group = args_.group_columns > 0 ? i * kColumns / args_.group_columns : 0;
      return args_.scales + (first_ + s) * args_.strip_scales + group * args_.group_scales;
    }

    void start(int64_t i, int64_t end, int buffer) {
      buffers_.begin(buffer, i);
      slices_ = (end - i) / kTilesOfChunk * kSlices;
      tile_ = i;
      buffer_ = buffer;
      from_ = stream_[0];
    }
    int64_t slices() const { return slices_; }

    // So many masks of every strip.
    inline void slice() {
      // Copies: members would be read again after every store, which may have changed them.
      const CodeTable<kKind> table = table_;
      const uint8_t* masks[kStrips];
      const uint8_t* run[kStrips];
      uint8_t* out[kStrips];
      each<kStrips>([&](auto s) SPARSE_BACKEND_INLINE {
        if (mask_ == 0) {
          run_[s] = stream_[s] + kMaskBytes;
          prefetch(stream_[s], kPrefetchBytes);
          prefetch(stream_[s] + 64, kPrefetchBytes);
        }
        masks[s] = stream_[s] + mask_ * (kMaskBytes / kMasks);
        run[s] = run_[s];
        out[s] = buffers_.tile(s, tile_, buffer_) + mask_ * kOperands * tiles::kRowBytes;
      });
      // A line for as many masks as take about one where half of the weights are zero.
      constexpr int64_t kFull = unstructured::run_bytes(kKind, kChunkWeights / kMasks);
      constexpr int kMasksOfLine = kFull > 64 ? 1 : 128 / kFull;
#pragma GCC unroll 8
      for (int m = 0; m < kSliceMasks; ++m) {
        each<kStrips>([&](auto s) SPARSE_BACKEND_INLINE {
          if (m % kMasksOfLine == 0) prefetch(run[s], kPrefetchBytes);
          __m512i w[kOperands];
          if constexpr (kX == Activations::kBf16) {
            next_pairs<kKind>(masks[s], m, run[s], table, w);
          } else {
            w[0] = next_bytes<kKind>(masks[s], m, run[s], table);
          }
          each<kOperands>([&](auto o) SPARSE_BACKEND_INLINE {
            _mm512_store_si512(out[s] + (m * kOperands + o) * tiles::kRowBytes, w[o]);
          });
        });
      }
      mask_ += kSliceMasks;
      const bool last = mask_ == kMasks;
      each<kStrips>([&](auto s) SPARSE_BACKEND_INLINE { (last ? stream_ : run_)[s] = run[s]; });
      if (!last) return;
      mask_ = 0;
      tile_ += kTilesOfChunk;
      decoded_ = stream_[0] - from_;
    }

   private:
    static constexpr int kMasks = kChunk / mask_columns(kKind);
    static constexpr int kOperands = kX == Activations::kBf16 ? mask_columns(kKind) / 2 : 1;
    static constexpr int kSliceMasks = kMasks < 8 ? kMasks : 8, kSlices = kMasks / kSliceMasks;
    static constexpr int kMost = kStrips == 4 ? kSmall : kLarge;

    const UnitArgs& args_;
    int first_;
    const CodeTable<kKind> table_;
    amx::Buffers<kStrips, kMost> buffers_;
    const uint8_t* stream_[kStrips];
    const uint8_t* run_[kStrips];
    const uint8_t* from_ = nullptr;
    int64_t slices_ = 0, tile_ = 0, decoded_ = 0;
    int mask_ = 0, buffer_ = 0;

   public:
    static constexpr int64_t kScratch = amx::Buffers<kStrips, kMost>::kScratch;
  };
};

}  // namespace

const Kernels& amx_kernels(Values values) { return amx::kernel_table<Policy>(values); }
const Kernels& amx_byte_kernels(Values values) { return amx::byte_kernel_table<Policy>(values); }

}  // namespace sparse_backend::bitmask

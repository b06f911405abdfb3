// AMX, for more tokens than are faster without (linear.cpp). Every entry of a block is stored to its place in
// a zeroed panel of 64 rows by 128 columns, laid out as B tiles; the panel is multiplied as dense weights
// are.
//
// Placing is scalar: two loads and a store for each entry, one entry a cycle at best, where a token costs
// AVX-512 (avx512_gemv.h) about a sixteenth of a cycle an entry. Emerald Rapids, 4096 x 5120, one thread,
// bf16 in 12 bits, 75% zeros, AVX-512 | tiles, ms: 17 tokens 9.1 | 11; 32 15 | 9; 64 31 | 13; 256 124 | 34.
// At 90% zeros: 17 tokens 4.6 | 7.6; 32 7.8 | 8.0; 64 17 | 11; 256 60 | 30. Panels of 128 columns instead of
// 256 are 5% slower. Compiled with avx512.cpp's flags; the tiles are inline assembly.
#include "../unstructured/amx_impl.h"
#include "../unstructured/decode_avx512.h"
#include "kernel_impl.h"

namespace sparse_backend::sell {
namespace {

namespace amx = unstructured::amx;
using amx::Activations;
using unstructured::each;
using unstructured::StripArgs;
using unstructured::StripKernels;

// The place of a row in the sorted order of its slice, by slot.
struct Places {
  uint8_t of[kSliceRows];
  constexpr Places() : of() {
    for (int p = 0; p < kSliceRows; ++p) of[slot(p)] = static_cast<uint8_t>(p);
  }
};
constexpr Places kPlaces;

template <Values kKind, Activations kX>
struct Policy {
  // As block_values() wants it.
  static constexpr Values kValues = kKind;
  using Decoder = unstructured::Avx512Decoder;
  using Stored = std::conditional_t<unstructured::is_integer(kKind), uint8_t, uint16_t>;

  static constexpr Activations kActivations = kX;
  static constexpr int kColumns = amx::unit_columns(kX), kTilesOfBlock = kBlockColumns / kColumns;
  // Integers: a block, after which avx512_gemv.h adds its sums too.
  static constexpr int kBlocks = kX == Activations::kBf16 ? 2 : 1;
  static constexpr int kSmall = 0, kLarge = kBlocks * kTilesOfBlock;
  static constexpr int kColumnStep = kBlockColumns;
  static constexpr int kPartStrips = kStripRows / unstructured::kStripRows;
  static constexpr int place_of(int column) { return column; }

  static constexpr int64_t kStripBytes = int64_t{kTilesOfBlock} * tiles::kBytes;
  static constexpr int64_t kBlockBytes = kPartStrips * kStripBytes, kPanelBytes = kBlocks * kBlockBytes;

  static void run(const StripArgs& args) {
    // Of integers with two halves of activations, tiles hold the sums of two strips: the second pair of a
    // part finds decoded what the first one asked for.
    constexpr int kStrips = kX == Activations::kWords ? 2 : 4;
    amx::Run<Policy, kStrips, amx::halves(kX)>(args, 0, args.strips / kStrips)();
    tiles::release();
  }

  template <int kStrips>
  class Strips {
   public:
    const int64_t tiles;
    static constexpr int columns = kColumns;

    Strips(const StripArgs& args, int first)
        : tiles((args.columns + kBlockColumns - 1) / kBlockColumns * kTilesOfBlock),
          args_(args),
          first_(first),
          stream_(args.strip[first]),
          panels_(static_cast<uint8_t*>(args.scratch)),
          words_(reinterpret_cast<uint16_t*>(panels_ + 2 * kPanelBytes)),
          places_(words_ + kBlockWords) {}

    int64_t column(int64_t i) const { return i * kColumns; }
    const uint8_t* tile(int s, int64_t i, int /*buffer*/) const {
      return panel(i) + (first_ % kPartStrips + s) * kStripBytes + i % kTilesOfBlock * tiles::kBytes;
    }
    // All strips' entries stand in one stream: a share of it for each. What was announced and not begun is
    // about as long as the last.
    int64_t bytes() const { return decoded_ / kStrips; }
    const uint8_t* next(int s) const {
      return stream_ + (slices_ > 0 && stream_ == from_ ? decoded_ : 0) + s * bytes();
    }
    int64_t segment_end(int64_t i) const { return (i / kTilesOfBlock + 1) * kTilesOfBlock; }
    const float* scales(int s, int64_t i) const {
      const int64_t group = args_.group_columns > 0 ? i * kColumns / args_.group_columns : 0;
      return args_.scales + group * args_.group_scales + (first_ + s) * args_.strip_scales;
    }

    void start(int64_t i, int64_t end, int /*buffer*/) {
      if (first_ % kPartStrips != 0) return;
      slices_ = (end - i) / kTilesOfBlock * kSlicesOfBlock;
      out_ = panel(i);
      from_ = stream_;
    }
    int64_t slices() const { return slices_; }

    inline void slice() {
      if (slice_ < kZeroSlices) {
        if (slice_ == 0) begin();
        constexpr int64_t kShare = kBlockBytes / kZeroSlices;
        uint8_t* out = out_ + slice_ * kShare;
        for (const uint8_t* end = out + kShare; out < end; out += 512) {
          each<8>([&](auto i)
                      SPARSE_BACKEND_INLINE { _mm512_store_si512(out + 64 * i, _mm512_setzero_si512()); });
        }
        if (slice_ < kSlices) find_places(slice_);
      } else {
        place();
      }
      if (++slice_ < kSlicesOfBlock) return;
      slice_ = 0;
      out_ += kBlockBytes;
      decoded_ = stream_ - from_;
    }

   private:
    static constexpr int kTogether = 8;  // entries
    static constexpr int kZeroSlices = 4, kPlaceSlices = 12, kSlicesOfBlock = kZeroSlices + kPlaceSlices;
    static_assert(kSlices <= kZeroSlices, "places are found while zeros are stored");

    // Of the unit's parts, in turn.
    uint8_t* panel(int64_t i) const {
      const int64_t turn = i / kLarge * (args_.strips / kPartStrips) + first_ / kPartStrips;
      return panels_ + turn % 2 * kPanelBytes + i % kLarge / kTilesOfBlock * kBlockBytes;
    }

    inline void begin() {
      const Block block(stream_, kKind);
      values_ = block_values<Policy>(block, *args_.exponents, words_);
      stream_ = block.next;
      left_ = block.header->entries;
      share_ = round_up((left_ + kPlaceSlices - 1) / kPlaceSlices, kTogether);
      // By slice and place, twice: of each row's two entries. A row of a tile is two or four columns of 16
      // rows.
      for (int r = 0; r < kStripRows; ++r) {
        const int rank = block.header->rank[r];
        const auto at = static_cast<uint32_t>(r / unstructured::kStripRows * kStripBytes +
                                              r % unstructured::kStripRows * 4);
        row_[rank / kSliceRows * kSliceRows + kPlaces.of[rank % kSliceRows]] = at * 0x10001U;
      }
      steps_ = block.header->steps;
      columns_ = block.columns;
      active_ = block.active;
      next_place_ = places_;
    }

    // Where in the panel the entries of a slice of rows stand: lines of columns, rows, columns of a line side
    // by side are bits of their own.
    inline void find_places(int slice) {
      constexpr int kPair = kX == Activations::kBf16 ? 1 : 2;  // columns side by side, as a shift
      constexpr int kWidth = sizeof(Stored);
      const __m512i rest = _mm512_set1_epi16(((1 << kPair) - 1) * kWidth);
      const __m512i row[2] = {_mm512_loadu_si512(row_ + slice * kSliceRows),
                              _mm512_loadu_si512(row_ + slice * kSliceRows + kSliceRows / 2)};
      const uint8_t* columns = columns_;
      uint16_t* places = next_place_;
      for (int step = steps_[slice]; step > 0; --step) {
        const int entries = 2 * *active_++;
        each<2>([&](auto half) SPARSE_BACKEND_INLINE {
          const __m512i column =
              _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(columns + 32 * half)));
          const __m512i line = _mm512_slli_epi16(_mm512_srli_epi16(column, kPair), 6);
          const __m512i in_line = _mm512_and_si512(_mm512_slli_epi16(column, kWidth / 2), rest);
          _mm512_storeu_si512(places + 32 * half, _mm512_or_si512(_mm512_or_si512(line, in_line), row[half]));
        });
        columns += entries;
        places += entries;
      }
      columns_ = columns;
      next_place_ = places;
    }

    // From the last entry on: a row's padding, a zero at column 0, comes before what may stand there.
    inline void place() {
      int64_t count = left_ < share_ ? left_ : share_;
      const Stored* values = values_ + left_;
      const uint16_t* places = places_ + left_;
      left_ -= count;
      uint8_t* out = out_;
      for (; count >= kTogether; count -= kTogether) {
        values -= kTogether;
        places -= kTogether;
        each<kTogether>([&](auto i) SPARSE_BACKEND_INLINE {
          constexpr int kEntry = kTogether - 1 - i;
          std::memcpy(out + places[kEntry], values + kEntry, sizeof(Stored));
        });
      }
      for (; count > 0; --count) std::memcpy(out + *--places, --values, sizeof(Stored));
    }

    const StripArgs& args_;
    const int first_;
    const uint8_t* stream_;
    const uint8_t* from_ = nullptr;
    uint8_t* panels_;
    uint16_t* words_;
    uint16_t* places_;  // of the block's entries, in bytes of its panel
    uint16_t* next_place_ = nullptr;
    const Stored* values_ = nullptr;
    const uint8_t* steps_ = nullptr;
    const uint8_t* columns_ = nullptr;
    const uint8_t* active_ = nullptr;
    alignas(64) uint32_t row_[kStripRows];
    uint8_t* out_ = nullptr;
    int64_t slices_ = 0, decoded_ = 0, left_ = 0, share_ = 0;
    int slice_ = 0;

   public:
    // Steps write whole registers of places.
    static constexpr int64_t kScratch = 2 * kPanelBytes + 2 * int64_t{kBlockWords} * 2;
  };
};

}  // namespace

const StripKernels& amx_kernels(Values values) { return amx::kernel_table<Policy>(values); }
const StripKernels& amx_byte_kernels(Values values) { return amx::byte_kernel_table<Policy>(values); }

}  // namespace sparse_backend::sell

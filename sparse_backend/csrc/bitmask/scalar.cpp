// Portable kernels: any processor, and the naive form of what the SIMD files do.
#include "../unstructured/decode_scalar.h"
#include "kernel_impl.h"

namespace sparse_backend::bitmask {
namespace {

template <class T>
struct RowsOf {
  T lane[kStripRows];
};

// A mask's weights [row][column] as `Element`s, added up to `Lane`s.
template <Values kKind, class Element_, class Lane>
struct ScalarBase {
  static constexpr Values kValues = kKind;
  static constexpr int kColumns = mask_columns(kKind);
  static constexpr int kOperands = 1, kBroadcasts = 1, kSums = 1;
  static constexpr int kVectorBytes = kStripRows * kColumns * static_cast<int>(sizeof(Element_));
  static constexpr int kGemvTokens = 2, kGemvTiles = 1, kTileStrips = 1, kGemmTile = 4, kTileStep = 1;
  static constexpr bool kReorder = false, kOffset = false;
  static constexpr int streams(int) { return 1; }
  static constexpr int sum_of(int) { return 0; }
  using Table = ExponentTable;
  using Element = Element_;
  struct Operand {
    Element weight[kStripRows][kColumns];
  };
  struct Broadcast {
    Element column[kColumns];
  };
  using Accumulator = RowsOf<Lane>;
  using Rows = Accumulator;
  using Sums = RowsOf<float>;

  static void decode(const uint8_t* masks, int i, const uint8_t*& run, const Table& table,
                     Operand out[kOperands]) {
    constexpr int kBits = kStripRows * kColumns;
    const auto stored = [&](int bit) { return (masks[(i * kBits + bit) / 8] >> (bit % 8)) & 1; };
    int count = 0;
    for (int bit = 0; bit < kBits; ++bit) count += stored(bit);
    uint16_t words[kBits];
    if constexpr (unstructured::ScalarDecoder::plain<kKind>()) {
      std::memcpy(words, run, 2 * count);
    } else {
      unstructured::ScalarDecoder::decode<kKind>(run, count, 0, table, words);
    }
    run += unstructured::run_bytes(kKind, count);
    const uint16_t* next = words;
    for (int bit = 0; bit < kBits; ++bit) {
      const uint16_t word = stored(bit) ? *next++ : uint16_t{0};
      const Place at = place_of(kKind, bit);
      Element& to = out[0].weight[at.row][at.column];
      if constexpr (unstructured::is_integer(kKind)) {
        to = static_cast<int16_t>(word);
      } else {
        to = kKind == Values::kFp16 ? float_from_fp16(word) : float_from_bf16(word);
      }
    }
  }
  static Broadcast broadcast(const uint8_t* x) {
    Broadcast b;
    std::memcpy(b.column, x, sizeof(b.column));
    return b;
  }
  static Operand load(const uint8_t* p) {
    Operand v;
    std::memcpy(v.weight, p, sizeof(v.weight));
    return v;
  }
  static void store(uint8_t* p, const Operand& v) { std::memcpy(p, v.weight, sizeof(v.weight)); }
  static Accumulator zero() { return Accumulator{}; }
  static Accumulator multiply_add(const Operand& w, const Broadcast& x, Accumulator acc) {
    for (int r = 0; r < kStripRows; ++r) {
      for (int c = 0; c < kColumns; ++c) acc.lane[r] += w.weight[r][c] * x.column[c];
    }
    return acc;
  }
  static Rows rows(const Accumulator acc[]) { return acc[0]; }
  static Sums no_sums() { return Sums{}; }
  static void store_rows(float* out, const Sums& v) { std::memcpy(out, v.lane, sizeof(v.lane)); }
};

template <Values kKind>
struct Scalar : ScalarBase<kKind, float, float> {};

template <Values kKind>
struct ScalarInteger : ScalarBase<kKind, int16_t, int32_t> {
  using Sums = RowsOf<float>;
  static Sums add_scaled(Sums sums, const RowsOf<int32_t>& rows, const float* scales) {
    for (int r = 0; r < kStripRows; ++r) sums.lane[r] += static_cast<float>(rows.lane[r]) * scales[r];
    return sums;
  }
};

}  // namespace

const Kernels& scalar_kernels(Values values) {
  return unstructured::kernel_table<Scalar, ScalarInteger>(
      values, [](auto simd) { return make_kernels<decltype(simd)>("scalar"); });
}

}  // namespace sparse_backend::bitmask

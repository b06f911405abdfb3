// Portable kernels: any processor, and the naive form of what the SIMD files do.
#include "../unstructured/decode_scalar.h"
#include "kernel_impl.h"

namespace sparse_backend::lanes {
namespace {

template <class T>
struct Lanes {
  T lane[kStripRows];
};

template <Values kKind>
struct Scalar {
  static constexpr Values kValues = kKind;
  static constexpr int kSteps = 1, kPer = 16, kParts = 1, kSums = 4, kGemvTokens = 2, kGemvTiles = 1,
                       kGemmTile = 4;
  static constexpr int kOffset = 0;
  static constexpr int kTileStrips = 1, kGemmSums = kSums;
  static constexpr int streams(int) { return 1; }
  using Element = float;
  using Operand = Lanes<float>;
  using Accumulator = Lanes<float>;
  using Sum = Accumulator;
  struct Table {
    ExponentTable exponents;
    explicit Table(const ExponentTable& table) : exponents(table) {}
  };

  template <int kStep>
  static void decode(const uint8_t* run, const Table& table, Operand out[kPer][kParts]) {
    uint16_t words[kBlockWeights];
    if constexpr (unstructured::ScalarDecoder::plain<kKind>()) {
      std::memcpy(words, run, sizeof(words));
    } else {
      unstructured::ScalarDecoder::decode<kKind>(run, kBlockWeights, 0, table.exponents, words);
    }
    for (int i = 0; i < kBlockWeights; ++i) {
      const Place at = value_at(kKind, i);
      out[at.column][0].lane[at.row] =
          kKind == Values::kFp16 ? float_from_fp16(words[i]) : float_from_bf16(words[i]);
    }
  }
  static Operand load(const uint8_t* p) {
    Operand v;
    std::memcpy(v.lane, p, sizeof(v.lane));
    return v;
  }
  static void store(uint8_t* p, const Operand& v) { std::memcpy(p, v.lane, sizeof(v.lane)); }
  static Accumulator zero() { return Accumulator{}; }
  static float broadcast(const uint8_t* x) {
    float value;
    std::memcpy(&value, x, sizeof(value));
    return value;
  }
  static Accumulator multiply_add(const Operand& w, float x, Accumulator acc) {
    for (int i = 0; i < kStripRows; ++i) acc.lane[i] += w.lane[i] * x;
    return acc;
  }
  static Accumulator add_sums(Accumulator a, const Accumulator& b) {
    for (int i = 0; i < kStripRows; ++i) a.lane[i] += b.lane[i];
    return a;
  }
  static void store_floats(float* out, int, const Accumulator& v) {
    std::memcpy(out, v.lane, sizeof(v.lane));
  }
};

template <Values kKind>
struct ScalarInteger {
  static constexpr Values kValues = kKind;
  static constexpr int kSteps = 1, kPer = 8, kParts = 1, kSums = 4, kGemvTokens = 2, kGemvTiles = 1,
                       kGemmTile = 4;
  static constexpr int kOffset = 0;
  static constexpr int kTileStrips = 1, kGemmSums = kSums;
  static constexpr int streams(int) { return 1; }
  using Element = int16_t;
  struct Operand {
    int16_t pair[kStripRows][2];
  };
  using Accumulator = Lanes<int32_t>;
  using Sum = Lanes<float>;
  using Table = Scalar<Values::kBf16>::Table;

  template <int kStep>
  static void decode(const uint8_t* run, const Table& table, Operand out[kPer][kParts]) {
    uint16_t words[kBlockWeights];
    unstructured::ScalarDecoder::decode<kKind>(run, kBlockWeights, 0, table.exponents, words);
    for (int i = 0; i < kBlockWeights; ++i) {
      const Place at = value_at(kKind, i);
      out[at.column / 2][0].pair[at.row][at.column % 2] = static_cast<int16_t>(words[i]);
    }
  }
  static Operand load(const uint8_t* p) {
    Operand v;
    std::memcpy(v.pair, p, sizeof(v.pair));
    return v;
  }
  static void store(uint8_t* p, const Operand& v) { std::memcpy(p, v.pair, sizeof(v.pair)); }
  static Accumulator zero() { return Accumulator{}; }
  static Sum zero_sum() { return Sum{}; }
  struct Broadcast {
    int16_t pair[2];
  };
  static Broadcast broadcast(const uint8_t* x) {
    Broadcast b;
    std::memcpy(b.pair, x, sizeof(b.pair));
    return b;
  }
  static Accumulator multiply_add(const Operand& w, const Broadcast& x, Accumulator acc) {
    for (int i = 0; i < kStripRows; ++i) acc.lane[i] += w.pair[i][0] * x.pair[0] + w.pair[i][1] * x.pair[1];
    return acc;
  }
  static Accumulator add_sums(Accumulator a, const Accumulator& b) {
    for (int i = 0; i < kStripRows; ++i) a.lane[i] += b.lane[i];
    return a;
  }
  static Sum add_scaled(Sum sum, const Accumulator& acc, const float* scales, int) {
    for (int i = 0; i < kStripRows; ++i) sum.lane[i] += static_cast<float>(acc.lane[i]) * scales[i];
    return sum;
  }
  static void store_floats(float* out, int, const Sum& v) { std::memcpy(out, v.lane, sizeof(v.lane)); }
};

}  // namespace

const Kernels& scalar_kernels(Values values) { return pick_kernels<Scalar, ScalarInteger>(values, "scalar"); }

}  // namespace sparse_backend::lanes

// What the levels avx2 and avx512 share: tokens multiplied one at a time or a few together, their activations
// looked up by the entries' columns in a block's tables of bytes.
//
// A Level has:
//   Word, kStepWords   a step's weights, unpacked
//   Weights<kValues>   of one step after the other, from the stream; unpack(rows, words)
//   Unpacked           the same, unpacked before
//   kTogether          2 or 4 tokens that multiply() takes at once
//   multiply<Simd, kTokens>(block, weights, x, out, out_stride, scales)
//                      adds a block's sums to out[token][row]
//   kDifferences       16 bytes of a table stand as what they differ in (exclusive or) from the 16 before
//
// A policy Simd of one kind of values has: kValues, kInteger.
#pragma once

#include "kernel_impl.h"

namespace sparse_backend::sell {
namespace {

// Prefetch distance where a thread reads one strip after the other: 8 KB reach the limit of memory on Zen 5
// (4 KB 36 GB/s of 41 on one thread, with 90% zeros).
constexpr int64_t kAhead = 8192;
constexpr int kTableBytes = 2 * kBlockColumns;  // of a token's block

// Where the values of a block's next step stand; asks for memory on the way.
template <Values kValues>
class ValueStream {
 public:
  const uint8_t* run;
  const uint8_t* codes;  // of kBf16x12 values
  ValueStream(const Block& block, int64_t ahead, bool to_l2)
      : run(block.run),
        codes(block.run + block.header->entries),
        ahead_(reinterpret_cast<const uint8_t*>(block.header), ahead, to_l2) {}

  inline void skip(int active) {
    if constexpr (kValues == Values::kBf16x12) {
      run += 2 * active;
      codes += active;
    } else {
      run += unstructured::run_bytes(kValues, 2 * active);
    }
    ahead_.ask(active);
  }

 private:
  StepsAhead<kValues> ahead_;
};

template <class Level, class Simd>
void gemv(const UnitArgs& args) {
  constexpr Values kValues = Simd::kValues;
  const int64_t stride = args.out_stride;
  const ExponentTable exponents = *args.exponents;
  auto* words = static_cast<typename Level::Word*>(args.scratch);
  const uint8_t* stream[kUnitStrips];
  for (int s = 0; s < args.strips; ++s) stream[s] = args.strip[s];
  for (int t = 0; t < args.tokens; ++t) {
    std::memset(args.out + t * stride, 0, args.strips * kStripRows * sizeof(float));
  }
  const auto* x = static_cast<const uint8_t*>(args.x);
  for (int64_t b = 0; b < args.blocks; ++b, x += int64_t{args.tokens} * kTableBytes) {
    for (int s = 0; s < args.strips; ++s) {
      const Block block(stream[s], kValues);
      // Where strips take turns, the strip's next block; it is about as long as this one.
      const bool one_stream = args.strips == 1;
      const int64_t ahead = one_stream ? kAhead : block.next - stream[s];
      typename Level::template Weights<kValues> weights(block, exponents, ahead, one_stream);
      const float* scales = block_scales<Simd>(args, b, s);
      float* out = args.out + s * kStripRows;
      stream[s] = block.next;
      if (args.tokens == 1) {
        Level::template multiply<Simd, 1>(block, weights, x, out, stride, scales);
        continue;
      }
      for (int j = 0; j < block.header->all_steps; ++j) {
        weights.unpack(block.active[j], words + Level::kStepWords * j);
      }
      const typename Level::Unpacked unpacked{words};
      int t = 0;
      if constexpr (Level::kTogether == 4) {
        for (; t + 4 <= args.tokens; t += 4) {
          Level::template multiply<Simd, 4>(block, unpacked, x + t * kTableBytes, out + t * stride, stride,
                                            scales);
        }
      }
      for (; t + 2 <= args.tokens; t += 2) {
        Level::template multiply<Simd, 2>(block, unpacked, x + t * kTableBytes, out + t * stride, stride,
                                          scales);
      }
      if (t < args.tokens) {
        Level::template multiply<Simd, 1>(block, unpacked, x + t * kTableBytes, out + t * stride, stride,
                                          scales);
      }
    }
  }
}

// [block][token][low bytes of 128 columns, high bytes].
template <class Level, class Simd>
float prepare(const void* x, DType dtype, int64_t k, int limit, int token, int tokens, int16_t* spare,
              void* out) {
  const int64_t padded = round_up(k, kBlockColumns);
  float scale = 1.0F;
  if constexpr (Simd::kInteger) {
    scale = unstructured::quantise_int16(x, dtype, k, padded, limit, spare);
  } else {
    std::memcpy(spare, x, 2 * k);
    std::memset(spare + k, 0, 2 * (padded - k));
  }
  auto* to = static_cast<uint8_t*>(out) + token * int64_t{kTableBytes};
  for (int64_t first = 0; first < padded; first += kBlockColumns, to += int64_t{tokens} * kTableBytes) {
    for (int i = 0; i < kBlockColumns; ++i) {
      const auto word = static_cast<uint16_t>(spare[first + i]);
      to[i] = static_cast<uint8_t>(word);
      to[kBlockColumns + i] = static_cast<uint8_t>(word >> 8);
    }
    constexpr int kBefore = 16;
    for (int i = 2 * kBlockColumns - 1; Level::kDifferences && i >= 0; --i) {
      if (i % kBlockColumns >= kBefore) to[i] ^= to[i - kBefore];
    }
  }
  return scale;
}

template <Values kKind>
bool gemv_takes(DType x_type) {
  if constexpr (unstructured::is_integer(kKind)) return true;
  return x_type == (kKind == Values::kFp16 ? DType::kFp16 : DType::kBf16);
}

}  // namespace
}  // namespace sparse_backend::sell

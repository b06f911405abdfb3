// The sell kernels, written once over a `Simd` policy that each instruction set's file defines:
//
//   kValues, Decoder, Stored   as in bitmask/kernel_impl.h
//   kLanes         tokens in a vector of the batched kernel
//   Vector, Sum    kLanes accumulators (int32 for integer values) and kLanes floats
//   zero(), multiply_add(weight, x, acc)   weight: the 4 bytes that widen() made of a stored value
//   add_scaled(out, acc, scale)            out[kLanes] += acc * scale
//
// A row's entries of a block are summed in order, two by two, into one accumulator that starts at
// zero; the blocks' sums are added in order. `gemv` and `batch` do the same: results depend on neither batch
// nor threads, nor on the instruction set, but for vdpbf16ps and tiles (amx.cpp), which round differently.
#pragma once

#include "../prefetch.h"
#include "../unstructured/quantise.h"
#include "kernels.h"

namespace sparse_backend::sell {
namespace {

// A block as it stands in the stream.
struct Block {
  const BlockHeader* header;
  const uint8_t* active;
  const uint8_t* columns;
  const uint8_t* run;
  const uint8_t* next;
  Block(const uint8_t* stream, Values values)
      : header(reinterpret_cast<const BlockHeader*>(stream)),
        active(stream + sizeof(BlockHeader)),
        columns(active + header->all_steps + header->all_steps % 2),
        run(columns + header->entries) {
    const int64_t bytes = unstructured::run_bytes(values, header->entries);
    next = run + bytes + bytes % 2;
  }
};

// A block's values, decoded to `words` unless they can be taken as they stand.
template <class Simd>
inline const typename Simd::Stored* block_values(const Block& block, const ExponentTable& table,
                                                 uint16_t* words) {
  using Stored = typename Simd::Stored;
  if constexpr (Simd::Decoder::template plain<Simd::kValues>()) {
    return reinterpret_cast<const Stored*>(block.run);
  } else {
    Simd::Decoder::template decode<Simd::kValues>(block.run, block.header->entries, 0, table, words);
    return reinterpret_cast<const Stored*>(words);
  }
}

// Asks memory for as much as a step takes, further on. Spread over the steps: all at once they would wait for
// each other, and the loads of this block for them.
template <Values kValues>
class StepsAhead {
 public:
  explicit StepsAhead(const uint8_t* at, int64_t distance = 0, bool to_l2 = false)
      : at_(at), next_(distance), to_l2_(to_l2) {}
  inline void ask(int active_rows) {
    constexpr int64_t kBytes = 2 + unstructured::run_bytes(kValues, 2);
    for (int64_t line = 0; line < kBytes * kSliceRows; line += 64) {
      to_l2_ ? prefetch_l2(at_, next_ + line) : prefetch(at_, next_ + line);
    }
    next_ += kBytes * active_rows;
  }

 private:
  const uint8_t* at_;
  int64_t next_;
  bool to_l2_;
};

// What a block's sums are multiplied by: the scales of the unit's rows, or nullptr for 1.
template <class Simd>
inline const float* block_scales(const UnitArgs& args, int64_t block, int strip) {
  if constexpr (!unstructured::is_integer(Simd::kValues)) return nullptr;
  const int64_t group = args.group_blocks > 0 ? block / args.group_blocks : 0;
  return args.scales + group * args.scale_stride + strip * kStripRows;
}

// The four bytes that multiply_add() takes for a stored value.
template <Values kValues, class Stored>
inline uint32_t widen(Stored value) {
  if constexpr (unstructured::is_integer(kValues)) {
    using Signed = std::conditional_t<sizeof(Stored) == 1, int8_t, int16_t>;
    return static_cast<uint16_t>(static_cast<Signed>(value));
  } else if constexpr (kValues == Values::kFp16) {
    return bits_from_float(float_from_fp16(value));
  } else {
    return static_cast<uint32_t>(value) << 16;
  }
}

template <class Simd, int kVectors>
void batch_vectors(const UnitArgs& args) {
  uint16_t* words = static_cast<uint16_t*>(args.scratch);
  uint32_t* weights = reinterpret_cast<uint32_t*>(words + kBlockWords);
  uint32_t* offsets = weights + kBlockWords;
  const ExponentTable table = *args.exponents;
  const uint8_t* stream[kUnitStrips];
  for (int s = 0; s < args.strips; ++s) stream[s] = args.strip[s];
  const int64_t column_bytes = int64_t{args.token_stride} * 4;
  for (int64_t i = 0; i < args.strips * kStripRows * int64_t{args.token_stride}; ++i) args.out[i] = 0;

  for (int64_t b = 0; b < args.blocks; ++b) {
    const uint8_t* x = static_cast<const uint8_t*>(args.x) + b * kBlockColumns * column_bytes;
    for (int s = 0; s < args.strips; ++s) {
      const Block block(stream[s], Simd::kValues);
      const auto* values = block_values<Simd>(block, table, words);
      StepsAhead<Simd::kValues> ahead(block.next);  // the next block is about as long
      stream[s] = block.next;
      const int entries = block.header->entries;
      for (int i = 0; i < entries; ++i) weights[i] = widen<Simd::kValues>(values[i]);
      for (int i = 0; i < entries; ++i) {
        offsets[i] = static_cast<uint32_t>(block.columns[i]) * static_cast<uint32_t>(column_bytes);
      }
      int row_of[kStripRows];
      for (int r = 0; r < kStripRows; ++r) row_of[block.header->rank[r]] = r;  // by slot
      const float* scales = block_scales<Simd>(args, b, s);
      float* out = args.out + int64_t{s} * kStripRows * args.token_stride;
      const uint8_t* active = block.active;
      int first[kBlockColumns / 2 + 1];
      int position = 0;
      for (int slice = 0; slice < kSlices; ++slice) {
        const int steps = block.header->steps[slice];
        for (int j = 0; j < steps; ++j) {
          first[j] = position;
          position += 2 * active[j];
          ahead.ask(active[j]);
        }
        int mine = steps;
        for (int lane = 0; lane < kSliceRows; ++lane) {
          while (mine > 0 && active[mine - 1] <= lane) --mine;
          typename Simd::Vector acc[kVectors];
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) acc[v] = Simd::zero();
          for (int j = 0; j < mine; ++j) {
            const int at = first[j] + 2 * lane;
            const uint8_t* x0 = x + offsets[at];
            const uint8_t* x1 = x + offsets[at + 1];
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
              acc[v] = Simd::multiply_add(weights[at], x0 + v * Simd::kLanes * 4, acc[v]);
            }
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
              acc[v] = Simd::multiply_add(weights[at + 1], x1 + v * Simd::kLanes * 4, acc[v]);
            }
          }
          const int row = row_of[slice * kSliceRows + slot(lane)];
          const float scale = scales == nullptr ? 1.0F : scales[row];
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) {
            Simd::add_scaled(out + int64_t{row} * args.token_stride + v * Simd::kLanes, acc[v], scale);
          }
        }
        active += steps;
      }
    }
  }
}

template <class Simd>
void batch(const UnitArgs& args) {
  static_assert(kBatchTokens % Simd::kLanes == 0, "whole vectors");
  switch (args.token_stride / Simd::kLanes) {
    case 1:
      return batch_vectors<Simd, 1>(args);
    case 2:
      return batch_vectors<Simd, 2>(args);
    case 4:
      return batch_vectors<Simd, 4>(args);
    default:
      return batch_vectors<Simd, 8>(args);
  }
}

}  // namespace
}  // namespace sparse_backend::sell

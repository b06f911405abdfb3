// What the gemv and the batched kernel of lanes share: the list of a strip's blocks, prefetches, groups of
// scales.
#pragma once

#include "../prefetch.h"
#include "../unstructured/prepare_strips.h"
#include "kernels.h"

namespace sparse_backend::lanes {
namespace {

// How far ahead of the decoder memory is asked for, in bytes of stream: together as much for one stream as
// for several, and of one that goes on into the strips that follow, so that it never starts cold.
constexpr int kPrefetchBytes = 2048, kOneStreamPrefetchBytes = 8192;

struct List {
  int count;
  const uint16_t* block;
  const uint8_t* runs;
  explicit List(const uint8_t* strip) {
    uint16_t last;
    std::memcpy(&last, strip, sizeof(last));
    count = last + 1;
    block = reinterpret_cast<const uint16_t*>(strip + sizeof(last));
    runs = strip + list_bytes(count);
  }
};

template <class Simd>
constexpr int64_t kRunBytes = unstructured::run_bytes(Simd::kValues, kBlockWeights);
template <class Simd>
constexpr bool kInteger = unstructured::is_integer(Simd::kValues);
template <class Simd>
constexpr int64_t kBlockBytes = kBlockColumns * int64_t{sizeof(typename Simd::Element)};

// Asks for what a step takes of the block that comes kAhead bytes later. Spread over the steps: a burst of
// prefetches would wait for each other, and the loads for them.
template <class Simd, int kStep, int kAhead>
inline void prefetch_step(const uint8_t* run) {
  constexpr int64_t kBytes = kRunBytes<Simd> / Simd::kSteps;
  constexpr int64_t kFirst = (kStep * kBytes + 63) / 64, kEnd = ((kStep + 1) * kBytes + 63) / 64;
#pragma GCC unroll 12
  for (int64_t line = kFirst; line < kEnd; ++line) {
    if constexpr (kAhead == kOneStreamPrefetchBytes) {
      prefetch_l2(run, kAhead + 64 * line);
    } else {
      prefetch(run, kAhead + 64 * line);
    }
  }
}

// Of integer values: where the group of block number `b` of the list ends, and where its scales stand
// among the strip's.
struct Group {
  int end;
  int64_t scales;
};

inline Group group_at(const UnitArgs& args, const List& list, int b) {
  int end = list.count - b < kFlushBlocks ? list.count : b + kFlushBlocks;
  if (args.group_columns == 0) return {end, 0};
  const int64_t group = list.block[b] * int64_t{kBlockColumns} / args.group_columns;
  int i = b + 1;
  while (i < end && list.block[i] * int64_t{kBlockColumns} / args.group_columns == group) ++i;
  return {i, group * args.group_scales};
}

// Whether strips [first, first + count) store the same blocks, as those of a dense weight do.
inline bool same_blocks(const UnitArgs& args, int first, int count) {
  uint16_t last, other;
  std::memcpy(&last, args.strip[first], sizeof(last));
  for (int s = 1; s < count; ++s) {
    if (args.strip[first + s] == nullptr) return false;
    // The count before the list: a shorter one may end where the buffer ends.
    std::memcpy(&other, args.strip[first + s], sizeof(other));
    if (other != last) return false;
    if (std::memcmp(args.strip[first], args.strip[first + s], 2 * (int64_t{last} + 2)) != 0) return false;
  }
  return true;
}

}  // namespace
}  // namespace sparse_backend::lanes

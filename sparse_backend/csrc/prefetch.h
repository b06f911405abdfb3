// Asking for memory before it is needed.
#pragma once

#include <cstdint>

namespace sparse_backend {
namespace {

// As an integer: the place may be past the end of the weight, where no pointer may point.
inline const void* place(const void* from, int64_t ahead) {
  return reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(from) + static_cast<uintptr_t>(ahead));
}

inline void prefetch(const void* from, int64_t ahead) { __builtin_prefetch(place(from, ahead)); }

// To the L2 cache, where a thread reads one stream after the other: it has more requests under way than an
// L1 cache does. Zen 4, one thread, `sell` with 75% zeros in 12 bits: 26 GB/s instead of 20, of 29.
inline void prefetch_l2(const void* from, int64_t ahead) {
  constexpr int kReads = 0, kKeepInL2 = 2;
  __builtin_prefetch(place(from, ahead), kReads, kKeepInL2);
}

}  // namespace
}  // namespace sparse_backend

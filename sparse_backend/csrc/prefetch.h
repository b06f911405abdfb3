// Asking for memory before it is needed.
#pragma once

#include <cstdint>

namespace sparse_backend {
namespace {

// As an integer: the place may be past the end of the weight, where no pointer may point.
inline void prefetch(const void* from, int64_t ahead) {
  __builtin_prefetch(
      reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(from) + static_cast<uintptr_t>(ahead)));
}

}  // namespace
}  // namespace sparse_backend

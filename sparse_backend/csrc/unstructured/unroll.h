// Loops over accumulators that are sure to be unrolled.
#pragma once

#include <type_traits>
#include <utility>

namespace sparse_backend::unstructured {
namespace {

// body(i) for i from 0 to kCount - 1, i a constant: a loop over accumulators that stays a loop, as GCC may
// leave one that it finds too long, keeps all of them in memory.
template <int... kIndex, class Body>
[[gnu::always_inline]] inline void each_of(std::integer_sequence<int, kIndex...>, const Body& body) {
  (body(std::integral_constant<int, kIndex>{}), ...);
}
template <int kCount, class Body>
[[gnu::always_inline]] inline void each(const Body& body) {
  each_of(std::make_integer_sequence<int, kCount>{}, body);
}

}  // namespace
}  // namespace sparse_backend::unstructured

#define SPARSE_BACKEND_INLINE __attribute__((always_inline))

// Loops over a ThreadPool. Included only by files compiled for the baseline processor.
#pragma once

#include <atomic>
#include <cstdint>

#include "common.h"

namespace sparse_backend {

// Calls body(begin, end) for consecutive ranges that cover [0, count). Ranges are handed
// out as threads become free: on a shared machine one core may be half as fast as another.
template <class Body>
void parallel_ranges(const ThreadPool& pool, int64_t count, int64_t range, const Body& body) {
  if (count <= 0) return;
  if (pool.threads <= 1 || count <= range) return body(int64_t{0}, count);
  struct Context {
    const Body* body;
    std::atomic<int64_t> next;
    int64_t count, range;
  } context{&body, {0}, count, range};
  pool.run(
      pool.threads,
      [](int64_t, void* opaque) {
        Context& c = *static_cast<Context*>(opaque);
        while (true) {
          const int64_t begin = c.next.fetch_add(c.range, std::memory_order_relaxed);
          if (begin >= c.count) return;
          (*c.body)(begin, begin + c.range < c.count ? begin + c.range : c.count);
        }
      },
      &context);
}

}  // namespace sparse_backend

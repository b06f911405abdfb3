// What the C++ tests share: counting failures, thread pools, exactly-sized buffers.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#include "common.h"

namespace sb = sparse_backend;

inline int failures = 0;

inline void fail(const char* what, const char* kernel, int64_t n, int64_t k, int tokens) {
  std::printf("FAILED %s: %s, N=%lld K=%lld tokens=%d\n", what, kernel, static_cast<long long>(n),
              static_cast<long long>(k), tokens);
  ++failures;
}

inline const sb::ThreadPool kOneThread{1, nullptr};
inline const sb::ThreadPool kThreads{3, [](int64_t count, void (*task)(int64_t, void*), void* context) {
                                       std::vector<std::thread> threads;
                                       for (int64_t i = 0; i < count; ++i)
                                         threads.emplace_back(task, i, context);
                                       for (auto& t : threads) t.join();
                                     }};

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<uint8_t, Free>;
// Exactly `bytes` long, so that a sanitizer sees the first byte past the end.
inline Buffer allocate(int64_t bytes, int alignment = 64) {
  void* p = nullptr;
  if (posix_memalign(&p, alignment, bytes > 0 ? bytes : 1) != 0) std::abort();
  return Buffer(static_cast<uint8_t*>(p));
}

// Every kernel of the low-bit family against int64 sums (lowbit_test.cpp).
void test_lowbit();
// Attention, dense products, norms, rotary embedding, SwiGLU (layers_test.cpp).
void test_layers();

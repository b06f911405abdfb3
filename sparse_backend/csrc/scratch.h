// Memory that a kernel's driver reuses from call to call. Included only by files compiled for
// the baseline processor.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "common.h"

namespace sparse_backend {

// Aligned memory that grows and stays with its thread, so that a call allocates nothing.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  uint8_t* reserve(int64_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = 0;
      data_ = static_cast<uint8_t*>(std::aligned_alloc(64, round_up(bytes, 64)));
      if (data_ == nullptr) throw std::bad_alloc();
      size_ = bytes;
    }
#if defined(SPARSE_BACKEND_POISON)  // in tests: what is used before it is written is NaN, or -1
    if (bytes > 0) std::memset(data_, 0xFF, bytes);
#endif
    return data_;
  }

 private:
  uint8_t* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace sparse_backend

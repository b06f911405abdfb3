#pragma once

#include <cstdint>

namespace sparse_backend {

// Asks the kernel for huge pages under [data, data + bytes), before the memory is first
// written: a weight is read once per token, and 4 KB pages spend that time on the TLB.
// Advice only; memory smaller than a huge page is left alone.
void advise_huge_pages(void* data, int64_t bytes);

}  // namespace sparse_backend

// Writing the sell stream (layout.h).
#pragma once

#include "../unstructured/pack.h"
#include "layout.h"

namespace sparse_backend::sell {

// The WritePart of this format's stream.
int64_t write_strip(const unstructured::Canonical& weight, const int64_t* row_start,
                    const unstructured::Encoding& encoding, int64_t strip, std::vector<uint8_t>* out);

}  // namespace sparse_backend::sell

// From the canonical form (mask, values) to the lanes stream.
#pragma once

#include "../unstructured/pack.h"

namespace sparse_backend::lanes {

// Writes one strip of 16 rows (unstructured::WritePart). Blocks without a stored weight are left out;
// what a stored block holds beside its weights are zeros.
int64_t write_strip(const unstructured::Canonical& weight, const int64_t* row_start,
                    const unstructured::Encoding& encoding, int64_t strip, std::vector<uint8_t>* out);

}  // namespace sparse_backend::lanes

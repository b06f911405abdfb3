// From the canonical form (mask, values) to the lanes stream.
#pragma once

#include "../unstructured/pack.h"

namespace sparse_backend::lanes {

// Blocks without a stored weight are left out; what a stored block holds beside its weights are zeros.
extern const unstructured::Stream kStream;

}  // namespace sparse_backend::lanes

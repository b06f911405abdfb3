// Writing the sell stream (layout.h).
#pragma once

#include "../unstructured/pack.h"
#include "layout.h"

namespace sparse_backend::sell {

extern const unstructured::Stream kStream;

}  // namespace sparse_backend::sell

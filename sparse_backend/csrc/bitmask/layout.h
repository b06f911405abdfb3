// Machine form of the bitmask format: one byte buffer that a kernel reads front to back.
//
//   Header            64 bytes
//   offsets           (panels + 1) x uint64, bytes from the start of the stream
//   (padding to 64)
//   stream            per panel of 4 rows, per chunk of 64 columns:
//                       4 x uint64  masks, bit j of mask r set = weight (r, 64 c + j) stored
//                       values      the stored weights of row 0, then of rows 1, 2 and 3
//   (64 bytes of zeros, so that a vector load may run past the last value)
//
// Masks stand in the stream beside their values so that a thread reads one sequential
// run of memory: the position of the next chunk follows from four population counts.
// Rows past N and columns past K have zero mask bits and cost no values. The layout is
// the same for every instruction set, so lowering never depends on the machine.
#pragma once

#include <cstdint>

namespace sparse_backend::bitmask {

constexpr int kPanelRows = 4;
constexpr int kChunk = 64;
constexpr int64_t kTailPadding = 64;
constexpr uint64_t kMagic = 0x31304B5354494253ULL;  // "SBITSK01", little endian

struct Header {
  uint64_t magic;
  int32_t value_type;  // DType of the stored values: kBf16 or kFp16
  int32_t reserved;
  int64_t out_features;  // N
  int64_t in_features;   // K
  int64_t nnz;
  int64_t panels;
  int64_t stream_offset;  // bytes from the start of the buffer
  int64_t total_bytes;    // of the whole buffer, tail padding included
};
static_assert(sizeof(Header) == 64, "the header is one cache line");

// A buffer that passed validation, ready for the kernels.
struct View {
  Header header;
  const uint64_t* offsets;
  const uint8_t* stream;
  int64_t chunks;  // per panel
};

// Returns nullptr and fills `view`, or says what is wrong with the buffer.
const char* parse(const uint8_t* buffer, int64_t bytes, View* view);

}  // namespace sparse_backend::bitmask

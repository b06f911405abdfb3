// The machine form that every unstructured format shares: one byte buffer of sections.
//
//   Header            128 bytes
//   offsets           (parts + 1) x uint64, bytes from the start of the stream; a part is what the
//                     format's stream is cut into (a panel of rows, a strip of rows)
//   scales            integer values: floats, [tile of rows][group][row]; a tile is all rows, or as many
//                     as a format says, the last one padded
//   escapes           kBf16x12: (N + 1) x uint32 first escape of each row, then the escapes
//   stream            the format's own; its layout.h says how
//   (kTailPadding bytes of zeros, so that decoders may read past the last run)
//
// Every section starts at a multiple of 64 bytes. The layout is the same for every instruction
// set, so lowering never depends on the machine.
#pragma once

#include <cstdint>

#include "values.h"

namespace sparse_backend::unstructured {

constexpr int64_t kTailPadding = 256;
constexpr int64_t kScaleRows = 16;  // room for scales is made for a multiple of so many rows

struct Header {
  uint64_t magic;  // names the format and its version
  Values values;
  int32_t group_size;       // columns per scale; 0: one scale per row
  int32_t activation_bits;  // integer values: of the quantised activations, sign included (8 or 16)
  int32_t reserved;
  int64_t out_features;  // N
  int64_t in_features;   // K
  int64_t stored;        // values in the stream
  int64_t parts;
  int64_t escapes;
  int64_t scales_offset;  // the offsets are bytes from the start of the buffer
  int64_t escapes_offset;
  int64_t stream_offset;
  int64_t total_bytes;
  ExponentTable exponents;
  int64_t unused[2];
};
static_assert(sizeof(Header) == 128, "the header is two cache lines");

// A weight of kBf16x12 whose exponent has no code.
struct Escape {
  uint32_t column;
  uint16_t bits;  // of the bf16
  uint16_t reserved;
};

struct View {
  Header header;
  const uint64_t* offsets;
  const float* scales;
  int64_t groups;                // scales per row
  const uint32_t* escape_start;  // nullptr where there are none
  const Escape* escapes;
  const uint8_t* stream;
};

int64_t scale_groups(const Header& header);

// Fills in the sections' offsets and total_bytes, for a stream of so many bytes.
void lay_out(Header* header, int64_t stream_bytes);

// Returns nullptr and fills `view`, or says what is wrong with the buffer. `rows_per_part` is the
// format's. Reads header, offsets and escape starts; the stream is taken on trust.
const char* parse(const uint8_t* buffer, int64_t bytes, uint64_t magic, int64_t rows_per_part, View* view);

}  // namespace sparse_backend::unstructured

#include "buffer.h"

namespace sparse_backend::unstructured {
namespace {

int64_t escape_bytes(const Header& h) {
  return h.escapes == 0 ? 0 : round_up((h.out_features + 1) * 4, 8) + h.escapes * int64_t{sizeof(Escape)};
}

}  // namespace

int64_t scale_groups(const Header& h) {
  if (!is_integer(h.values)) return 0;
  return h.group_size > 0 ? (h.in_features + h.group_size - 1) / h.group_size : 1;
}

void lay_out(Header* h, int64_t stream_bytes) {
  h->scales_offset = int64_t{sizeof(Header)} + round_up((h->parts + 1) * 8, 64);
  h->escapes_offset =
      h->scales_offset + round_up(round_up(h->out_features, kScaleRows) * scale_groups(*h) * 4, 64);
  h->stream_offset = h->escapes_offset + round_up(escape_bytes(*h), 64);
  h->total_bytes = h->stream_offset + stream_bytes + kTailPadding;
}

const char* parse(const uint8_t* buffer, int64_t bytes, uint64_t magic, int64_t rows_per_part, View* view) {
  if (bytes < int64_t{sizeof(Header)}) return "packed weight is shorter than its header";
  std::memcpy(&view->header, buffer, sizeof(Header));
  const Header& h = view->header;
  if (h.magic != magic) return "packed weight does not start with this format's header";
  const auto kind = static_cast<int32_t>(h.values);
  if (kind < 0 || kind >= kValueKinds) return "packed weight has an unknown kind of values";
  // Bounds first: the sums below must not overflow on a header that is garbage.
  constexpr int64_t kMaxFeatures = int64_t{1} << 31;
  const bool group = h.group_size == 0 || h.group_size == 32 || h.group_size == 64 || h.group_size == 128 ||
                     h.group_size == 256;
  const bool bits = h.activation_bits == (is_integer(h.values) ? h.activation_bits & 24 : 0) &&
                    (h.activation_bits != 24) && (is_integer(h.values) == (h.activation_bits != 0));
  if (h.out_features < 0 || h.in_features < 0 || h.out_features > kMaxFeatures ||
      h.in_features > kMaxFeatures || h.stored < 0 || h.stored > 4 * bytes || h.escapes < 0 ||
      h.escapes > bytes || !group || !bits ||
      h.parts != (h.out_features + rows_per_part - 1) / rows_per_part || h.parts > bytes / 8 ||
      (is_integer(h.values) && h.out_features > 0 && scale_groups(h) > bytes / h.out_features)) {
    return "packed weight's header does not agree with its size";
  }
  Header expected = h;
  lay_out(&expected, 0);
  const int64_t stream_bytes = bytes - expected.total_bytes;
  if (stream_bytes < 0 || h.scales_offset != expected.scales_offset ||
      h.escapes_offset != expected.escapes_offset || h.stream_offset != expected.stream_offset ||
      h.total_bytes != bytes) {
    return "packed weight's header does not agree with its size";
  }
  view->offsets = reinterpret_cast<const uint64_t*>(buffer + sizeof(Header));
  bool ordered = view->offsets[0] == 0 && view->offsets[h.parts] == static_cast<uint64_t>(stream_bytes);
  for (int64_t p = 0; p < h.parts; ++p) ordered &= view->offsets[p] <= view->offsets[p + 1];
  view->escape_start = nullptr;
  view->escapes = nullptr;
  if (h.escapes > 0) {
    const uint8_t* section = buffer + h.escapes_offset;
    view->escape_start = reinterpret_cast<const uint32_t*>(section);
    view->escapes = reinterpret_cast<const Escape*>(section + round_up((h.out_features + 1) * 4, 8));
    ordered &= view->escape_start[0] == 0 && view->escape_start[h.out_features] == h.escapes;
    for (int64_t n = 0; n < h.out_features; ++n) {
      ordered &= view->escape_start[n] <= view->escape_start[n + 1];
    }
  }
  if (!ordered) return "packed weight's offsets are damaged";
  view->scales = reinterpret_cast<const float*>(buffer + h.scales_offset);
  view->groups = scale_groups(h);
  view->stream = buffer + h.stream_offset;
  return nullptr;
}

}  // namespace sparse_backend::unstructured

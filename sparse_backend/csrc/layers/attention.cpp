#include "attention.h"

#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "../parallel.h"
#include "../scratch.h"
#include "kernels.h"

namespace sparse_backend::layers {
namespace {

// Positions that are summed apart and then put together: a long sequence is work for several
// threads, and the result is the same however it is handed out.
constexpr int64_t kSegment = 1024;
constexpr float kNegativeInfinity = -std::numeric_limits<float>::infinity();

// Up to kAttentionRows rows of one sequence that share a head of K and V: row r is token
// r / group, query head r % group of the ones that share it.
struct Tile {
  int64_t sequence, first_token, head;
  int64_t begin, end;  // positions
  int64_t row;
  int rows;
};

struct Shape {
  int64_t group, q_stride, sum_stride;  // strides in floats
};

// Running softmax of a tile: largest, total, sums.
struct State {
  float* largest;
  float* total;
  float* sums;
};

State state_at(float* memory, int rows) { return {memory, memory + rows, memory + 2 * rows}; }

void clear(const State& s, int rows, int64_t sum_stride) {
  for (int r = 0; r < rows; ++r) {
    s.largest[r] = kNegativeInfinity;
    s.total[r] = 0.0F;
  }
  std::memset(s.sums, 0, static_cast<size_t>(rows * sum_stride) * sizeof(float));
}

// `to` followed by `from`.
void merge(const State& from, const State& to, int rows, int64_t sum_stride) {
  for (int r = 0; r < rows; ++r) {
    const float largest = from.largest[r] > to.largest[r] ? from.largest[r] : to.largest[r];
    if (largest == kNegativeInfinity) continue;
    const float keep = std::exp(to.largest[r] - largest), add = std::exp(from.largest[r] - largest);
    to.largest[r] = largest;
    to.total[r] = to.total[r] * keep + from.total[r] * add;
    float* sums = to.sums + r * sum_stride;
    const float* more = from.sums + r * sum_stride;
    for (int64_t d = 0; d < sum_stride; ++d) sums[d] = sums[d] * keep + more[d] * add;
  }
}

class Run {
 public:
  Run(const AttentionArgs& args, const Shape& shape) : a_(args), shape_(shape) {}

  // Positions [begin, end) of a tile, which lie in one segment, into `state`.
  void segment(const Tile& t, int64_t begin, int64_t end, const State& state) const {
    thread_local Scratch memory;
    const int64_t q_floats = kAttentionRows * shape_.q_stride;
    float* q = reinterpret_cast<float*>(memory.reserve((q_floats + kAttentionRows * kPositions) * 4));
    const Kernels& k = kernels();
    int64_t first[kAttentionRows], last[kAttentionRows];
    const int64_t length = a_.lengths[t.sequence], fresh = new_tokens(t.sequence);
    for (int r = 0; r < t.rows; ++r) {
      const int64_t token = (t.row + r) / shape_.group,
                    head = t.head * shape_.group + (t.row + r) % shape_.group;
      const uint8_t* from =
          static_cast<const uint8_t*>(a_.q) +
          ((t.first_token + token) * a_.q_stride + head * a_.head_dim) * element_bytes(a_.type);
      float* to = q + r * shape_.q_stride;
      k.widen[static_cast<int>(a_.type)](from, a_.head_dim, a_.scale, to);
      for (int64_t d = a_.head_dim; d < shape_.q_stride; ++d) to[d] = 0.0F;
      const int64_t position = length - fresh + token;
      last[r] = a_.causal ? position + 1 : length;
      first[r] = a_.window >= 0 && position > a_.window ? position - a_.window : 0;
    }
    AttendArgs args{};
    args.q = q;
    args.q_stride = shape_.q_stride;
    args.rows = t.rows;
    args.head_dim = a_.head_dim;
    args.v_dim = a_.v_dim;
    args.k = static_cast<const uint8_t*>(a_.k_cache) + t.head * a_.head_dim * element_bytes(a_.cache_type);
    args.v = static_cast<const uint8_t*>(a_.v_cache) + t.head * a_.v_dim * element_bytes(a_.cache_type);
    args.k_stride = a_.kv_heads * a_.head_dim;
    args.v_stride = a_.kv_heads * a_.v_dim;
    args.slots = a_.slot_table + a_.row_of[t.sequence] * a_.row_length;
    args.begin = begin;
    args.end = end;
    args.first = first;
    args.last = last;
    args.logit_cap = a_.logit_cap;
    args.scores = q + q_floats;
    args.largest = state.largest;
    args.total = state.total;
    args.sums = state.sums;
    args.sum_stride = shape_.sum_stride;
    clear(state, t.rows, shape_.sum_stride);
    k.attend[static_cast<int>(a_.cache_type)](args);
  }

  void finish(const Tile& t, const State& state) const {
    const Kernels& k = kernels();
    for (int r = 0; r < t.rows; ++r) {
      const int64_t token = (t.row + r) / shape_.group,
                    head = t.head * shape_.group + (t.row + r) % shape_.group;
      uint8_t* to = static_cast<uint8_t*>(a_.out) +
                    ((t.first_token + token) * a_.heads + head) * a_.v_dim * element_bytes(a_.type);
      k.narrow[static_cast<int>(a_.type)](state.sums + r * shape_.sum_stride, a_.v_dim, 1.0F / state.total[r],
                                          to);
    }
  }

  int64_t new_tokens(int64_t sequence) const {
    return a_.new_tokens == nullptr ? 1 : a_.new_tokens[sequence];
  }

 private:
  const AttentionArgs& a_;
  const Shape& shape_;
};

std::vector<Tile> tiles_of(const AttentionArgs& a, const Run& run, int64_t group) {
  std::vector<Tile> tiles;
  int64_t first_token = 0;
  for (int64_t s = 0; s < a.sequences; ++s) {
    const int64_t fresh = run.new_tokens(s), rows = fresh * group, before = a.lengths[s] - fresh;
    for (int64_t row = 0; row < rows; row += kAttentionRows) {
      const int64_t count = rows - row < kAttentionRows ? rows - row : kAttentionRows;
      const int64_t lowest = before + row / group, highest = before + (row + count - 1) / group;
      const int64_t begin =
          a.window >= 0 && lowest > a.window ? (lowest - a.window) / kPositions * kPositions : 0;
      const int64_t end = a.causal ? highest + 1 : a.lengths[s];
      for (int64_t head = 0; head < a.kv_heads; ++head)
        tiles.push_back({s, first_token, head, begin, end, row, static_cast<int>(count)});
    }
    first_token += fresh;
  }
  return tiles;
}

const char* problem(const AttentionArgs& a, const ThreadPool& pool) {
  int64_t tokens = 0;
  for (int64_t s = 0; s < a.sequences; ++s) {
    if (a.row_of[s] < 0 || a.row_of[s] >= a.rows) return "a sequence's row is outside slot_table";
    if (a.lengths[s] < 0 || a.lengths[s] > a.row_length) return "a sequence is longer than slot_table's rows";
    const int64_t fresh = a.new_tokens == nullptr ? 1 : a.new_tokens[s];
    if (fresh < 0 || fresh > a.lengths[s]) return "a sequence has more new tokens than positions";
    tokens += fresh;
  }
  if (tokens != a.tokens) return "q has not as many tokens as the sequences have new ones";
  std::atomic<bool> outside{false};
  parallel_ranges(pool, a.sequences, 1 + 65536 / (a.row_length + 1), [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const int32_t* slots = a.slot_table + a.row_of[s] * a.row_length;
      uint32_t most = 0;  // a negative slot is a large one
      for (int64_t i = 0; i < a.lengths[s]; ++i) {
        const auto slot = static_cast<uint32_t>(slots[i]);
        most = slot > most ? slot : most;
      }
      if (a.lengths[s] > 0 && most >= a.slots) outside = true;
    }
  });
  return outside ? "slot_table names a slot that the caches do not have" : nullptr;
}

}  // namespace

const char* attention(const AttentionArgs& a, const ThreadPool& pool) {
  if (const char* wrong = problem(a, pool)) return wrong;
  constexpr int64_t kPad = 16;  // the widest vector
  const Shape shape{a.heads / a.kv_heads, round_up(a.head_dim, kPad), round_up(a.v_dim, kPad)};
  const Run run(a, shape);
  const std::vector<Tile> tiles = tiles_of(a, run, shape.group);
  if (tiles.empty()) return nullptr;

  struct Part {
    int64_t tile, begin, end;
    int64_t state;  // where its floats are
  };
  std::vector<Part> parts;
  int64_t work = 0, floats = 0;
  for (size_t i = 0; i < tiles.size(); ++i) {
    const Tile& t = tiles[i];
    work += (t.end - t.begin) * t.rows * a.head_dim;
    for (int64_t begin = t.begin; begin < t.end; begin = (begin / kSegment + 1) * kSegment) {
      const int64_t next = (begin / kSegment + 1) * kSegment;
      parts.push_back({static_cast<int64_t>(i), begin, next < t.end ? next : t.end, floats});
      floats += t.rows * (2 + shape.sum_stride);
    }
  }
  const auto count = static_cast<int64_t>(tiles.size());
  constexpr int64_t kSmall = 65536;  // waking the pool costs as much
  if (count >= 4 * int64_t{pool.threads} || parts.size() == tiles.size() || work < kSmall) {
    parallel_ranges(pool, count, work < kSmall ? count : 1, [&](int64_t begin, int64_t end) {
      thread_local Scratch memory;
      float* floats =
          reinterpret_cast<float*>(memory.reserve(2 * kAttentionRows * (2 + shape.sum_stride) * 4));
      for (int64_t i = begin; i < end; ++i) {
        const Tile& t = tiles[i];
        const State state = state_at(floats, t.rows),
                    next = state_at(floats + kAttentionRows * (2 + shape.sum_stride), t.rows);
        for (int64_t first = t.begin; first < t.end;) {
          const int64_t segment_end = (first / kSegment + 1) * kSegment,
                        last = segment_end < t.end ? segment_end : t.end;
          const bool opening = first == t.begin;
          run.segment(t, first, last, opening ? state : next);
          if (!opening) merge(next, state, t.rows, shape.sum_stride);
          first = last;
        }
        run.finish(t, state);
      }
    });
    return nullptr;
  }
  // Few tiles, long sequences: the segments of one tile go to several threads.
  thread_local Scratch memory;
  float* states = reinterpret_cast<float*>(memory.reserve(floats * 4));
  const auto state_of = [&](size_t part) {
    return state_at(states + parts[part].state, tiles[parts[part].tile].rows);
  };
  parallel_ranges(pool, static_cast<int64_t>(parts.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      run.segment(tiles[parts[i].tile], parts[i].begin, parts[i].end, state_of(i));
  });
  for (size_t i = 0, j = 0; i < parts.size(); i = j) {
    const Tile& t = tiles[parts[i].tile];
    const State state = state_of(i);
    for (j = i + 1; j < parts.size() && parts[j].tile == parts[i].tile; ++j)
      merge(state_of(j), state, t.rows, shape.sum_stride);
    run.finish(t, state);
  }
  return nullptr;
}

}  // namespace sparse_backend::layers

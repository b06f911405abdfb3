// The kernels, over a vector class (vectors.h). Included once per instruction set.
#pragma once

#include "../activations.h"
#include "kernels.h"

namespace sparse_backend::layers {
namespace {

constexpr float kNegativeInfinity = -__builtin_inff();

// e^x to 2 ulp for x up to 88, zero below -87: Cody-Waite reduction and the polynomial of Cephes' expf.
template <class Vec>
inline typename Vec::Reg exponential(typename Vec::Reg x) {
  const auto low = Vec::set1(-87.0F);
  // Constants first: these return their second operand where one is NaN, so that NaN comes through.
  const auto in_range = Vec::min(Vec::set1(88.0F), Vec::max(low, x));
  const auto n = Vec::nearest(Vec::mul(in_range, Vec::set1(1.44269504F)));
  auto r = Vec::fma(n, Vec::set1(-0.693359375F), in_range);
  r = Vec::fma(n, Vec::set1(2.12194440e-4F), r);
  auto p = Vec::set1(1.9875691500e-4F);
  constexpr float kTerms[] = {1.3981999507e-3F, 8.3334519073e-3F, 4.1665795894e-2F, 1.6666665459e-1F,
                              5.0000001201e-1F};
  for (const float c : kTerms) p = Vec::fma(p, r, Vec::set1(c));
  p = Vec::add(Vec::fma(Vec::mul(r, r), p, r), Vec::set1(1.0F));
  return Vec::keep_from(x, low, Vec::scale_by_power(p, n));
}

inline const void* at(const void* base, int64_t element, DType type) {
  return static_cast<const uint8_t*>(base) + element * element_bytes(type);
}

// All lanes, or the first `count` of them.
template <class Vec, DType kType>
inline typename Vec::Reg load_first(const void* p, int64_t i, int count) {
  return count == Vec::kLanes ? Vec::template load_as<kType>(p, i)
                              : Vec::template load_part<kType>(p, i, count);
}

template <class Vec, DType kType>
inline void store_first(void* p, int64_t i, typename Vec::Reg v, int count) {
  if (count == Vec::kLanes) {
    Vec::template store_as<kType>(p, i, v);
  } else {
    Vec::template store_part<kType>(p, i, v, count);
  }
}

template <class Vec>
inline int lanes_left(int64_t i, int64_t size) {
  return static_cast<int>(size - i < Vec::kLanes ? size - i : Vec::kLanes);
}

// ---- dense: dot products of a tile of rows and tokens ----

template <class Vec, DType kType, int kRows, int kTokens>
inline void dense_tile(const DenseArgs& a, int row, int token) {
  using Reg = typename Vec::Reg;
  const void* w[kRows];
  const float* x[kTokens];
  for (int r = 0; r < kRows; ++r) w[r] = at(a.w, (row + r) * a.w_stride, kType);
  for (int t = 0; t < kTokens; ++t) x[t] = a.x + (token + t) * a.x_stride;
  Reg acc[kRows][kTokens];
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kTokens; ++t) acc[r][t] = Vec::set1(0.0F);
  const int64_t full = a.first + (a.last - a.first) / Vec::kLanes * Vec::kLanes;
  for (int64_t k = a.first; k < full; k += Vec::kLanes) {
    Reg weights[kRows];
    for (int r = 0; r < kRows; ++r) weights[r] = Vec::template load_as<kType>(w[r], k);
    for (int t = 0; t < kTokens; ++t) {
      const Reg activation = Vec::load(x[t] + k);
      for (int r = 0; r < kRows; ++r) acc[r][t] = Vec::fma(weights[r], activation, acc[r][t]);
    }
  }
  if (const int rest = static_cast<int>(a.last - full); rest > 0) {
    for (int r = 0; r < kRows; ++r) {
      const Reg weight = Vec::template load_part<kType>(w[r], full, rest);
      for (int t = 0; t < kTokens; ++t)
        acc[r][t] = Vec::fma(weight, Vec::template load_part<DType::kFp32>(x[t], full, rest), acc[r][t]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kTokens; ++t) a.sums[(token + t) * a.sum_stride + row + r] += Vec::sum(acc[r][t]);
}

template <class Vec, DType kType>
void dense(const DenseArgs& a) {
  constexpr int kTokens = Vec::kTileTokens;
  int row = 0;
  for (; row + 4 <= a.rows; row += 4) {
    int token = 0;
    for (; token + kTokens <= a.tokens; token += kTokens) dense_tile<Vec, kType, 4, kTokens>(a, row, token);
    for (; token < a.tokens; ++token) dense_tile<Vec, kType, 4, 1>(a, row, token);
  }
  for (; row < a.rows; ++row)
    for (int token = 0; token < a.tokens; ++token) dense_tile<Vec, kType, 1, 1>(a, row, token);
}

// ---- attention ----

template <class Vec, DType kType, int kRows, int kCount>
inline void score_tile(const AttendArgs& a, const void* const* k, int row, int column) {
  using Reg = typename Vec::Reg;
  Reg acc[kRows][kCount];
  for (int r = 0; r < kRows; ++r)
    for (int j = 0; j < kCount; ++j) acc[r][j] = Vec::set1(0.0F);
  const float* q = a.q + row * a.q_stride;
  const int full = a.head_dim / Vec::kLanes * Vec::kLanes;
  for (int d = 0; d < full; d += Vec::kLanes) {
    Reg keys[kCount];
    for (int j = 0; j < kCount; ++j) keys[j] = Vec::template load_as<kType>(k[column + j], d);
    for (int r = 0; r < kRows; ++r) {
      const Reg query = Vec::load(q + r * a.q_stride + d);
      for (int j = 0; j < kCount; ++j) acc[r][j] = Vec::fma(query, keys[j], acc[r][j]);
    }
  }
  if (const int rest = a.head_dim - full; rest > 0) {
    for (int j = 0; j < kCount; ++j) {
      const Reg key = Vec::template load_part<kType>(k[column + j], full, rest);
      for (int r = 0; r < kRows; ++r)
        acc[r][j] = Vec::fma(Vec::load(q + r * a.q_stride + full), key, acc[r][j]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int j = 0; j < kCount; ++j) a.scores[(row + r) * kPositions + column + j] = Vec::sum(acc[r][j]);
}

// A slot's part of one head is a few lines, and the next slot is far away: no hardware prefetcher sees it.
inline void prefetch(const void* p, int elements, DType type) {
  const auto* bytes = static_cast<const char*>(p);
  const int64_t size = elements * element_bytes(type);
  for (int64_t i = 0; i < size; i += 64) __builtin_prefetch(bytes + i);
}

template <class Vec, DType kType, int kRows>
inline void score_rows(const AttendArgs& a, const void* const* k, const void* const* v, int row, int count) {
  constexpr int kCount = Vec::kTileTokens;
  int j = 0;
  for (; j + kCount <= count; j += kCount) {
    if (row == 0)
      for (int i = j; i < j + kCount; ++i) prefetch(v[i], a.v_dim, kType);
    score_tile<Vec, kType, kRows, kCount>(a, k, row, j);
  }
  for (; j < count; ++j) score_tile<Vec, kType, kRows, 1>(a, k, row, j);
}

// Scores of one row become weights; returns what the row's sums so far have to be multiplied by.
template <class Vec>
inline float softmax_row(const AttendArgs& a, int row, int64_t begin, int count) {
  float* scores = a.scores + row * kPositions;
  if (a.logit_cap > 0.0F) {
    // cap * tanh(s / cap), with tanh(x) = 1 - 2 / (e^2x + 1).
    const auto one = Vec::set1(1.0F), cap = Vec::set1(a.logit_cap), scale = Vec::set1(2.0F / a.logit_cap);
    for (int j = 0; j < count; j += Vec::kLanes) {
      const auto e = exponential<Vec>(Vec::mul(Vec::load(scores + j), scale));
      Vec::store(scores + j, Vec::mul(cap, Vec::sub(one, Vec::div(Vec::set1(2.0F), Vec::add(e, one)))));
    }
  }
  const int padded = static_cast<int>(round_up(count, Vec::kLanes));
  const int64_t first = a.first[row] - begin, last = a.last[row] - begin;
  if (first >= count || last <= 0) {  // the row sees none of these positions
    for (int j = 0; j < padded; ++j) scores[j] = 0.0F;
    return 1.0F;
  }
  for (int j = 0; j < padded; ++j)
    if (j < first || j >= last || j >= count) scores[j] = kNegativeInfinity;
  auto most = Vec::set1(a.largest[row]);
  for (int j = 0; j < padded; j += Vec::kLanes) most = Vec::max(most, Vec::load(scores + j));
  const float largest = Vec::largest(most);
  auto total = Vec::set1(0.0F);
  for (int j = 0; j < padded; j += Vec::kLanes) {
    const auto weight = exponential<Vec>(Vec::sub(Vec::load(scores + j), Vec::set1(largest)));
    Vec::store(scores + j, weight);
    total = Vec::add(total, weight);
  }
  alignas(64) float lanes[Vec::kLanes];
  Vec::store(lanes, exponential<Vec>(Vec::set1(a.largest[row] - largest)));
  a.total[row] = a.total[row] * lanes[0] + Vec::sum(total);
  a.largest[row] = largest;
  return lanes[0];
}

template <class Vec, DType kType, int kRows, int kParts, bool kRest>
inline void value_tile(const AttendArgs& a, const void* const* v, int row, int d, int count,
                       const float* factors, int rest) {
  using Reg = typename Vec::Reg;
  Reg acc[kRows][kParts];
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kParts; ++c)
      acc[r][c] =
          Vec::mul(Vec::load(a.sums + (row + r) * a.sum_stride + d + c * Vec::kLanes), Vec::set1(factors[r]));
  for (int j = 0; j < count; ++j) {
    // Past the end the slots are those of this block again: harmless.
    if (row == 0 && d == 0) prefetch(v[kPositions + j], a.head_dim, kType);
    Reg values[kParts];
    for (int c = 0; c < kParts; ++c)
      values[c] = kRest ? Vec::template load_part<kType>(v[j], d, rest)
                        : Vec::template load_as<kType>(v[j], d + c * Vec::kLanes);
    for (int r = 0; r < kRows; ++r) {
      const Reg weight = Vec::set1(a.scores[(row + r) * kPositions + j]);
      for (int c = 0; c < kParts; ++c) acc[r][c] = Vec::fma(weight, values[c], acc[r][c]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kParts; ++c)
      Vec::store(a.sums + (row + r) * a.sum_stride + d + c * Vec::kLanes, acc[r][c]);
}

template <class Vec, DType kType, int kRows>
inline void value_rows(const AttendArgs& a, const void* const* v, int row, int count, const float* factors) {
  constexpr int kWide = Vec::kTileParts * Vec::kLanes;
  int d = 0;
  for (; d + kWide <= a.v_dim; d += kWide)
    value_tile<Vec, kType, kRows, Vec::kTileParts, false>(a, v, row, d, count, factors, 0);
  for (; d + Vec::kLanes <= a.v_dim; d += Vec::kLanes)
    value_tile<Vec, kType, kRows, 1, false>(a, v, row, d, count, factors, 0);
  if (d < a.v_dim) value_tile<Vec, kType, kRows, 1, true>(a, v, row, d, count, factors, a.v_dim - d);
}

template <class Vec, DType kType>
void attend(const AttendArgs& a) {
  const void* k[kPositions];
  const void* v[2 * kPositions];  // and behind them K of the next block, for the prefetch
  float factors[kAttentionRows];
  for (int64_t begin = a.begin; begin < a.end; begin += kPositions) {
    const int count = static_cast<int>(a.end - begin < kPositions ? a.end - begin : kPositions);
    for (int j = 0; j < count; ++j) {
      k[j] = at(a.k, a.slots[begin + j] * a.k_stride, kType);
      v[j] = at(a.v, a.slots[begin + j] * a.v_stride, kType);
      const int64_t next = begin + kPositions + j;
      v[kPositions + j] = at(a.k, a.slots[next < a.end ? next : begin + j] * a.k_stride, kType);
    }
    int row = 0;
    for (; row + 4 <= a.rows; row += 4) score_rows<Vec, kType, 4>(a, k, v, row, count);
    for (; row < a.rows; ++row) score_rows<Vec, kType, 1>(a, k, v, row, count);
    for (row = 0; row < a.rows; ++row) factors[row] = softmax_row<Vec>(a, row, begin, count);
    row = 0;
    for (; row + 4 <= a.rows; row += 4) value_rows<Vec, kType, 4>(a, v, row, count, factors + row);
    for (; row < a.rows; ++row) value_rows<Vec, kType, 1>(a, v, row, count, factors + row);
  }
}

// ---- one token at a time ----

template <class Vec, DType kType>
void widen(const void* x, int64_t count, float factor, float* out) {
  const auto scale = Vec::set1(factor);
  int64_t i = 0;
  for (; i + Vec::kLanes <= count; i += Vec::kLanes)
    Vec::store(out + i, Vec::mul(Vec::template load_as<kType>(x, i), scale));
  for (; i < count; ++i) out[i] = read_float<kType>(x, i) * factor;
}

template <class Vec, DType kType>
void narrow(const float* x, int64_t count, float factor, void* out) {
  const auto scale = Vec::set1(factor);
  int64_t i = 0;
  for (; i + Vec::kLanes <= count; i += Vec::kLanes)
    Vec::template store_as<kType>(out, i, Vec::mul(Vec::load(x + i), scale));
  if (i < count) {
    const int rest = static_cast<int>(count - i);
    const auto last = Vec::template load_part<DType::kFp32>(x, i, rest);
    Vec::template store_part<kType>(out, i, Vec::mul(last, scale), rest);
  }
}

template <class Vec, DType kType, DType kWeight>
void scale_by_weight(const NormArgs& a, float factor) {
  const auto scale = Vec::set1(factor);
  for (int64_t i = 0; i < a.size; i += Vec::kLanes) {
    const int count = lanes_left<Vec>(i, a.size);
    auto y = Vec::mul(load_first<Vec, DType::kFp32>(a.scratch, i, count), scale);
    if (a.round_before_weight) {
      store_first<Vec, kType>(a.y, i, y, count);
      y = load_first<Vec, kType>(a.y, i, count);
    }
    store_first<Vec, kType>(a.y, i, Vec::mul(y, load_first<Vec, kWeight>(a.weight, i, count)), count);
  }
}

template <class Vec, DType kType>
void norm(const NormArgs& a) {
  auto squares = Vec::set1(0.0F);
  for (int64_t i = 0; i < a.size; i += Vec::kLanes) {
    const int count = lanes_left<Vec>(i, a.size);
    auto x = load_first<Vec, kType>(a.x, i, count);
    if (a.residual != nullptr) {
      x = Vec::add(x, load_first<Vec, kType>(a.residual, i, count));
      store_first<Vec, kType>(a.sum, i, x, count);
    }
    squares = Vec::fma(x, x, squares);
    store_first<Vec, DType::kFp32>(a.scratch, i, x, count);
  }
  const float factor = 1.0F / __builtin_sqrtf(Vec::sum(squares) / static_cast<float>(a.size) + a.eps);
  if (a.weight_type == DType::kBf16) return scale_by_weight<Vec, kType, DType::kBf16>(a, factor);
  if (a.weight_type == DType::kFp16) return scale_by_weight<Vec, kType, DType::kFp16>(a, factor);
  scale_by_weight<Vec, kType, DType::kFp32>(a, factor);
}

template <class Vec, DType kType>
void rotate(const RotateArgs& a) {
  const int half = a.rotary_dim / 2;
  for (int64_t head = 0; head < a.heads; ++head) {
    uint8_t* x = static_cast<uint8_t*>(a.x) + head * a.head_stride * element_bytes(kType);
    const auto turn = [&](int i, int j, int c) {
      const float first = read_float<kType>(x, i), second = read_float<kType>(x, j);
      store_float(x, kType, i, first * a.cos[c] - second * a.sin[c]);
      store_float(x, kType, j, second * a.cos[c] + first * a.sin[c]);
    };
    int i = 0;
    if (a.halves) {
      for (; i + Vec::kLanes <= half; i += Vec::kLanes) {
        const auto first = Vec::template load_as<kType>(x, i),
                   second = Vec::template load_as<kType>(x, half + i);
        const auto cos = Vec::load(a.cos + i), sin = Vec::load(a.sin + i);
        Vec::template store_as<kType>(x, i, Vec::sub(Vec::mul(first, cos), Vec::mul(second, sin)));
        Vec::template store_as<kType>(x, half + i, Vec::add(Vec::mul(second, cos), Vec::mul(first, sin)));
      }
      for (; i < half; ++i) turn(i, half + i, i);
    } else {
      for (; i < half; ++i) turn(2 * i, 2 * i + 1, i);
    }
  }
}

template <class Vec, DType kType>
void silu(const void* gates, const void* ups, int64_t size, void* out) {
  for (int64_t i = 0; i < size; i += Vec::kLanes) {
    const int count = lanes_left<Vec>(i, size);
    const auto gate = load_first<Vec, kType>(gates, i, count), up = load_first<Vec, kType>(ups, i, count);
    const auto e = exponential<Vec>(Vec::sub(Vec::set1(0.0F), gate));
    // Below -87 the exponential is at its bound, and silu is zero.
    const auto activated =
        Vec::keep_from(gate, Vec::set1(-87.0F), Vec::div(gate, Vec::add(Vec::set1(1.0F), e)));
    store_first<Vec, kType>(out, i, Vec::mul(activated, up), count);
  }
}

template <class Vec>
Kernels make_kernels() {
  constexpr DType b = DType::kBf16, h = DType::kFp16, f = DType::kFp32;
  return {{attend<Vec, b>, attend<Vec, h>, attend<Vec, f>}, {dense<Vec, b>, dense<Vec, h>, dense<Vec, f>},
          {norm<Vec, b>, norm<Vec, h>, norm<Vec, f>},       {rotate<Vec, b>, rotate<Vec, h>, rotate<Vec, f>},
          {silu<Vec, b>, silu<Vec, h>, silu<Vec, f>},       {widen<Vec, b>, widen<Vec, h>, widen<Vec, f>},
          {narrow<Vec, b>, narrow<Vec, h>, narrow<Vec, f>}};
}

}  // namespace
}  // namespace sparse_backend::layers

// Tiles of decoded weights times tiles of activations, for amx_impl.h, which says what a policy and its
// strips are.
#pragma once

#include <immintrin.h>

#include "../tiles.h"
#include "strips.h"
#include "unroll.h"

namespace sparse_backend::unstructured::amx {
namespace {

enum class Activations { kBf16, kBytes, kWords };

constexpr int halves(Activations a) { return a == Activations::kWords ? 2 : 1; }
constexpr int unit_columns(Activations a) { return a == Activations::kBf16 ? 32 : 64; }
constexpr int64_t unit_bytes(Activations a) { return tiles::kRowBytes * halves(a); }

// Tiles 0 to 3 hold sums, 4 and 5 activations, 6 and 7 weights.
constexpr int kFirstX = 4, kFirstW = 6;

// The product of kStrips strips with kX tiles of activations: of two tiles of tokens, or both halves of one.
template <class Policy, int kStrips, int kX>
struct Product {
  static_assert(kStrips * kX <= kFirstX && kX <= kFirstW - kFirstX, "registers");
  static constexpr Activations kKind = Policy::kActivations;
  static constexpr int kHalves = halves(kKind), kTokenTiles = kX / kHalves;

  const StripArgs& args;
  int first;              // strip
  int token, rows[2]{};   // of each tile of tokens
  const uint8_t* x[2]{};  // and its activations

  Product(const StripArgs& a, int first_strip, int first_token)
      : args(a), first(first_strip), token(first_token) {
    for (int t = 0; t < kTokenTiles; ++t) {
      const int from = token + t * args.tile_tokens, left = args.tokens - from;
      rows[t] = left < args.tile_tokens ? left : args.tile_tokens;
      x[t] = args.x + from * args.x_row_bytes;
    }
  }

  void configure(int columns) const {
    tiles::Config config;
    const int bytes = columns * tiles::kRowBytes / unit_columns(kKind);
    for (int i = 0; i < kX; ++i) {
      const int tokens = rows[i / kHalves];
      config.set(kFirstX + i, tokens, bytes);
      for (int s = 0; s < kStrips; ++s) config.set(s * kX + i, tokens, tiles::kRowBytes);
    }
    for (int b = kFirstW; b < tiles::kTiles; ++b) config.set(b, bytes / 4, tiles::kRowBytes);
    tiles::configure(config);
  }

  inline void zero() const {
    each<kStrips * kX>([](auto c) SPARSE_BACKEND_INLINE { tiles::zero<c>(); });
  }

  float* out(int s, int t) const {
    return args.out + ((first + s) * args.tokens + token + t * args.tile_tokens) * kStripRows;
  }
  inline void load_sums() const {
    each<kStrips * kX>([&](auto c) SPARSE_BACKEND_INLINE { tiles::load<c>(out(c / kX, c % kX)); });
  }
  inline void store_sums() const {
    each<kStrips * kX>([&](auto c) SPARSE_BACKEND_INLINE { tiles::store<c>(out(c / kX, c % kX)); });
  }

  // Adds the products of tiles [i, end), and after each calls meanwhile().
  template <class Strips, class Meanwhile>
  inline void multiply(const Strips& strips, int64_t i, int64_t end, int buffer, Meanwhile& meanwhile) const {
    constexpr int64_t kUnit = unit_bytes(kKind), kColumns = unit_columns(kKind);
    constexpr int64_t kColumnBytes = tiles::kRowBytes / kColumns;
    for (; i < end; ++i) {
      const int64_t column = strips.column(i);
      each<kX>([&](auto a) SPARSE_BACKEND_INLINE {
        const int64_t at = column / kColumns * kUnit * rows[a / kHalves] + column % kColumns * kColumnBytes;
        tiles::load<kFirstX + a>(x[a / kHalves] + at + a % kHalves * tiles::kRowBytes, kUnit);
      });
      each<kStrips>([&](auto s) SPARSE_BACKEND_INLINE {
        constexpr int kS = s, kW = kFirstW + kS % 2;
        tiles::load<kW>(strips.tile(s, i, buffer));
        each<kX>([](auto a) SPARSE_BACKEND_INLINE {
          constexpr auto kDot = kKind == Activations::kBf16              ? tiles::Dot::kBf16
                                : kKind == Activations::kWords && a == 0 ? tiles::Dot::kUnsignedBySigned
                                                                         : tiles::Dot::kSigned;
          tiles::multiply<kDot, kS * kX + a, kFirstX + a, kW>();
        });
      });
      meanwhile();
    }
  }

  // Moves integer sums, times their scales, to `out`; the tiles are zero afterwards.
  template <class Strips>
  inline void flush(const Strips& strips, int64_t i) const {
    alignas(64) int32_t sums[kX][tiles::kRows][kStripRows];
    each<kStrips>([&](auto s) SPARSE_BACKEND_INLINE {
      constexpr int kS = s;
      each<kX>([&](auto a) SPARSE_BACKEND_INLINE { tiles::store<kS * kX + a>(sums[a]); });
      const __m512 scales = _mm512_loadu_ps(strips.scales(s, i));
      for (int t = 0; t < kTokenTiles; ++t) {
        float* to = out(s, t);
        for (int row = 0; row < rows[t]; ++row) {
          __m512i sum = _mm512_load_si512(sums[t * kHalves][row]);
          if constexpr (kHalves == 2) {
            const __m512i high = _mm512_load_si512(sums[kHalves - 1][row]);
            sum = _mm512_add_epi32(sum, _mm512_slli_epi32(high, 8));
          }
          const __m512 before = _mm512_load_ps(to + row * kStripRows);
          _mm512_store_ps(to + row * kStripRows, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scales, before));
        }
      }
    });
    zero();
  }
};

}  // namespace
}  // namespace sparse_backend::unstructured::amx

// Emulated AMX tiles. Included by immintrin.h.
#pragma once

struct EmulatedTiles {
  bool configured = false;
  int rows[8] = {}, bytes[8] = {};
  uint8_t data[8][16][64] = {};
};
inline EmulatedTiles& emulated_tiles() {
  static thread_local EmulatedTiles tiles;
  return tiles;
}
inline void _tile_loadconfig(const void* config) {
  const uint8_t* c = static_cast<const uint8_t*>(config);
  EmulatedTiles& t = emulated_tiles();
  t = EmulatedTiles();
  if (c[0] != 1) __builtin_trap();  // palette 1: 8 tiles of up to 16 rows of 64 bytes
  t.configured = true;
  for (int i = 0; i < 8; ++i) {
    uint16_t bytes;
    std::memcpy(&bytes, c + 16 + 2 * i, 2);
    t.bytes[i] = bytes;
    t.rows[i] = c[48 + i];
    if (bytes > 64 || t.rows[i] > 16) __builtin_trap();
  }
}
inline void _tile_release() { emulated_tiles() = EmulatedTiles(); }
// The tile, which must have been given a size: the processor raises an exception else.
inline EmulatedTiles& emulated_tile(int tile) {
  EmulatedTiles& t = emulated_tiles();
  if (!t.configured || t.rows[tile] == 0 || t.bytes[tile] == 0) __builtin_trap();
  return t;
}
inline void _tile_zero(int tile) {
  EmulatedTiles& t = emulated_tile(tile);
  std::memset(t.data[tile], 0, sizeof(t.data[tile]));
}
inline void _tile_loadd(int tile, const void* base, int64_t stride) {
  _tile_zero(tile);
  EmulatedTiles& t = emulated_tile(tile);
  for (int r = 0; r < t.rows[tile]; ++r) {
    std::memcpy(t.data[tile][r], static_cast<const uint8_t*>(base) + r * stride, t.bytes[tile]);
  }
}
inline void _tile_stored(int tile, void* base, int64_t stride) {
  EmulatedTiles& t = emulated_tile(tile);
  for (int r = 0; r < t.rows[tile]; ++r) {
    std::memcpy(static_cast<uint8_t*>(base) + r * stride, t.data[tile][r], t.bytes[tile]);
  }
}

// C[m][n] = add(C[m][n], A[m], B, n) for rows of A and B that fit together.
template <class Sum, class Add>
inline void emulated_product(int c, int a, int b, const Add& add) {
  EmulatedTiles& t = emulated_tile(c);
  emulated_tile(a), emulated_tile(b);
  if (t.rows[c] != t.rows[a] || t.bytes[a] != 4 * t.rows[b] || t.bytes[c] != t.bytes[b]) __builtin_trap();
  for (int m = 0; m < t.rows[c]; ++m) {
    for (int n = 0; n < t.bytes[c] / 4; ++n) {
      Sum sum;
      std::memcpy(&sum, t.data[c][m] + 4 * n, 4);
      sum = add(sum, t, m, n);
      std::memcpy(t.data[c][m] + 4 * n, &sum, 4);
    }
  }
}
// Sums over k of A[m][4 k ..] times B[k][4 n ..]: A's bytes are Left, B's Right.
template <class Left, class Right>
inline void emulated_byte_product(int c, int a, int b) {
  emulated_product<int32_t>(c, a, b, [=](int32_t sum, const EmulatedTiles& t, int m, int n) {
    for (int k = 0; k < t.rows[b]; ++k) {
      for (int j = 0; j < 4; ++j) {
        sum += static_cast<int32_t>(static_cast<Left>(t.data[a][m][4 * k + j])) *
               static_cast<Right>(t.data[b][k][4 * n + j]);
      }
    }
    return sum;
  });
}
inline void _tile_dpbssd(int c, int a, int b) { emulated_byte_product<int8_t, int8_t>(c, a, b); }
inline void _tile_dpbsud(int c, int a, int b) { emulated_byte_product<int8_t, uint8_t>(c, a, b); }
inline void _tile_dpbusd(int c, int a, int b) { emulated_byte_product<uint8_t, int8_t>(c, a, b); }
// Even and odd columns are summed apart, from zero, then added.
inline void _tile_dpbf16ps(int c, int a, int b) {
  emulated_product<float>(c, a, b, [=](float sum, const EmulatedTiles& t, int m, int n) {
    float part[2] = {};
    for (int k = 0; k < t.rows[b]; ++k) {
      for (int j = 0; j < 2; ++j) {
        uint16_t x, w;
        std::memcpy(&x, t.data[a][m] + 4 * k + 2 * j, 2);
        std::memcpy(&w, t.data[b][k] + 4 * n + 2 * j, 2);
        part[j] = std::fma(emulated_float(uint32_t{x} << 16), emulated_float(uint32_t{w} << 16), part[j]);
      }
    }
    return sum + (part[0] + part[1]);
  });
}

// AMX tiles. Their numbers are part of an instruction, so they are template arguments here. Included only by
// files of the level `amx`; where that runs, the operating system has been asked for tile state
// (cpu_features.cpp).
//
// C += A B with A of up to 16 rows of 64 bytes, B of as many rows as A has groups of four bytes. Emerald
// Rapids: a multiplication every 16 cycles (9 for up to 8 rows of A), a tile loaded from L1 every 8. What
// has just been stored is not forwarded to a tile: 16 stores, a load, a multiplication take 75 cycles, and
// 20 if the load is of what was stored four tiles before.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(SPARSE_BACKEND_EMULATE_AVX512)
#include <immintrin.h>
#endif

namespace sparse_backend::tiles {
namespace {

constexpr int kRows = 16, kRowBytes = 64, kBytes = kRows * kRowBytes, kTiles = 8;

enum class Dot { kBf16, kSigned, kUnsignedBySigned, kSignedByUnsigned };

// Rows and bytes of a row of every tile; until set, a tile may not be used.
struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int tile_rows, int bytes) {
    rows[tile] = static_cast<uint8_t>(tile_rows);
    row_bytes[tile] = static_cast<uint16_t>(bytes);
  }
};

// Zeroes all tiles.
inline void configure(const Config& config) {
#if defined(SPARSE_BACKEND_EMULATE_AVX512)
  _tile_loadconfig(&config);
#else
  __asm__ volatile("ldtilecfg %0" ::"m"(config));
#endif
}

// Gives the tiles back: the operating system need not save them any more.
inline void release() {
#if defined(SPARSE_BACKEND_EMULATE_AVX512)
  _tile_release();
#else
  __asm__ volatile("tilerelease" ::);
#endif
}

template <int kTile>
inline void zero() {
#if defined(SPARSE_BACKEND_EMULATE_AVX512)
  _tile_zero(kTile);
#else
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile));
#endif
}

template <int kTile>
inline void load(const void* rows, int64_t stride = kRowBytes) {
#if defined(SPARSE_BACKEND_EMULATE_AVX512)
  _tile_loadd(kTile, rows, stride);
#else
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(stride), "i"(kTile) : "memory");
#endif
}

template <int kTile>
inline void store(void* rows, int64_t stride = kRowBytes) {
#if defined(SPARSE_BACKEND_EMULATE_AVX512)
  _tile_stored(kTile, rows, stride);
#else
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(rows), "r"(stride), "i"(kTile) : "memory");
#endif
}

// Tile kC += tile kA times tile kB.
template <Dot kDot, int kC, int kA, int kB>
inline void multiply() {
#if defined(SPARSE_BACKEND_EMULATE_AVX512)
  if constexpr (kDot == Dot::kBf16) _tile_dpbf16ps(kC, kA, kB);
  if constexpr (kDot == Dot::kSigned) _tile_dpbssd(kC, kA, kB);
  if constexpr (kDot == Dot::kUnsignedBySigned) _tile_dpbusd(kC, kA, kB);
  if constexpr (kDot == Dot::kSignedByUnsigned) _tile_dpbsud(kC, kA, kB);
#else
  if constexpr (kDot == Dot::kBf16) {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
  } else if constexpr (kDot == Dot::kSigned) {
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
  } else if constexpr (kDot == Dot::kUnsignedBySigned) {
    __asm__ volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
  } else {
    __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
  }
#endif
}

}  // namespace
}  // namespace sparse_backend::tiles

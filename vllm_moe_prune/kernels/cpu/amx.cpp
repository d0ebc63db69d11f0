// AMX tiles: 16 steps of a block, expanded, are a tile of weights as they stand.
// Up to 32 tokens use an expansion at once, from a buffer in the first-level cache; for
// more, a pair of blocks is expanded whole into the second-level cache and read again.

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>
#include <vector>

#include "moe.h"

namespace moe_prune {
namespace {

constexpr int AHEAD = 1024;
constexpr int TILE = 512;  // elements of a tile, of weights and of tokens

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t colsb[16] = {};
  uint8_t rows[16] = {};
};

// Compilers' tile intrinsics do not say which memory they read; without this, what has
// been written for them may not be there yet, or ever.
inline void written() { __asm__ __volatile__("" ::: "memory"); }

// 16 steps of a block, dense, in the order of a tile.
inline const uint16_t* expand(const uint32_t* masks, const uint16_t* values,
                              uint16_t* tile) {
  for (int step = 0; step < 16; ++step) {
    uint32_t mask = masks[step];
    if (step % 2 == 0)
      _mm_prefetch(reinterpret_cast<const char*>(values) + AHEAD, _MM_HINT_T0);
    __m512i packed = _mm512_loadu_si512(values);
    _mm512_store_si512(tile + step * 32, _mm512_maskz_expand_epi16(mask, packed));
    values += __builtin_popcount(mask);
  }
  return values;
}

// Tiles 0 to 3: sums of (token tile, block); 4 and 5: tokens; 6 and 7: weights.
inline void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// x points at a tile of tokens; the tile of the next 16 tokens is next_tokens behind it.
template <int TOKEN_TILES>
inline void multiply(const uint16_t* x, int64_t next_tokens, const uint16_t* first,
                     const uint16_t* second) {
  written();
  _tile_loadd(6, first, 64);
  _tile_loadd(7, second, 64);
  _tile_loadd(4, x, 64);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  if (TOKEN_TILES == 2) {
    _tile_loadd(5, x + next_tokens, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

template <int TOKEN_TILES>
inline void store_sums(float* y) {
  constexpr int64_t stride = WIDTH * sizeof(float);
  _tile_stored(0, y, stride);
  _tile_stored(1, y + BLOCK, stride);
  if (TOKEN_TILES == 2) {
    _tile_stored(2, y + ROWS * WIDTH, stride);
    _tile_stored(3, y + ROWS * WIDTH + BLOCK, stride);
  }
}

template <int TOKEN_TILES>
void at_once(const Stream pair[2], const uint16_t* x, int64_t k, float* y) {
  alignas(64) uint16_t tiles[2][2][TILE];
  const uint16_t* values[2] = {static_cast<const uint16_t*>(pair[0].values),
                               static_cast<const uint16_t*>(pair[1].values)};
  zero_sums();
  for (int64_t k0 = 0; k0 < k; k0 += STEP, x += TILE) {
    // Two buffers in turn: expanding the next one need not wait for the tile loads.
    auto& now = tiles[(k0 / STEP) % 2];
    for (int b = 0; b < 2; ++b)
      values[b] = expand(pair[b].masks + k0 / 2, values[b], now[b]);
    multiply<TOKEN_TILES>(x, ROWS * k, now[0], now[1]);
  }
  store_sums<TOKEN_TILES>(y);
}

template <int TOKEN_TILES>
void from_panel(const uint16_t* panel, const uint16_t* x, int64_t k, float* y) {
  zero_sums();
  for (int64_t k0 = 0; k0 < k; k0 += STEP, panel += 2 * TILE, x += TILE)
    multiply<TOKEN_TILES>(x, ROWS * k, panel, panel + TILE);
  store_sums<TOKEN_TILES>(y);
}

uint16_t* panel_for(int64_t k) {
  thread_local std::vector<uint16_t> memory;
  size_t needed = 2 * BLOCK * k + 32;
  if (memory.size() < needed) memory.resize(needed);
  auto address = reinterpret_cast<uintptr_t>(memory.data());
  return reinterpret_cast<uint16_t*>((address + 63) / 64 * 64);
}

}  // namespace

void pair_amx(const Stream pair[2], const void* x_tiles, int64_t, int64_t m, int64_t k,
              float* y) {
  const uint16_t* x = static_cast<const uint16_t*>(x_tiles);
  if (m <= ROWS) return at_once<1>(pair, x, k, y);
  if (m <= 2 * ROWS) return at_once<2>(pair, x, k, y);
  uint16_t* panel = panel_for(k);
  const uint16_t* values[2] = {static_cast<const uint16_t*>(pair[0].values),
                               static_cast<const uint16_t*>(pair[1].values)};
  for (int64_t k0 = 0; k0 < k; k0 += STEP)
    for (int b = 0; b < 2; ++b)
      values[b] = expand(pair[b].masks + k0 / 2, values[b],
                         panel + (k0 / STEP * 2 + b) * TILE);
  for (int64_t row = 0; row < m; row += 2 * ROWS) {
    if (m - row > ROWS)
      from_panel<2>(panel, x + row * k, k, y + row * WIDTH);
    else
      from_panel<1>(panel, x + row * k, k, y + row * WIDTH);
  }
}

bool amx_allowed() {
  constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // arch_prctl(2)
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

thread_local TileConfig others;  // what whoever used the tiles before had configured

void amx_begin() {
  __asm__ __volatile__("sttilecfg %0" : "=m"(others));
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.rows[tile] = 16;
    config.colsb[tile] = 64;
  }
  written();
  __asm__ __volatile__("ldtilecfg %0" ::"m"(config));
}

void amx_end() { __asm__ __volatile__("ldtilecfg %0" ::"m"(others)); }

}  // namespace moe_prune

// AMX tiles: 16 steps of a block, expanded, are a tile of weights as they stand.
// Up to 32 tokens use an expansion at once, from a buffer in the first-level cache. For
// more, a chunk of some pairs is expanded into the second-level cache, while the first
// 32 tokens are multiplied; the others read it from there.

#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>
#include <vector>

#include "expansion.h"
#include "widening.h"

namespace moe_prune {
namespace {

constexpr int TILE = 512;  // elements of a tile, of weights and of tokens
constexpr int64_t CHUNK = 1024;  // inputs expanded before other tokens use them

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

// 16 steps of a block, dense, in the order of a tile. A cursor is where they come from.
template <class V>
inline void expand(Cursor<V>& at, uint16_t* tile) {
  _mm_prefetch(reinterpret_cast<const char*>(at.masks) + AHEAD, _MM_HINT_T0);
  for (int step = 0; step < STEP / 2; ++step) {
    if (step % 2 == 0) at.prefetch();
    _mm512_store_si512(tile + step * 32, at.expanded(step));
  }
  at.masks += STEP / 2;
  at.scales = V::after(at.scales, STEP / 2);
}

template <int BITS>
inline void expand(amx::Cursor<Int<BITS>>& at, uint16_t* tile) {
  const __m512i in_turn = _mm512_set_epi16(
      31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
      20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  for (int step = 0; step < STEP / 2; step += 4)
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) {
      const amx::Two wide = at.expanded(step, u);
      auto halves = (__m512i)_mm512_cvtne2ps_pbh(wide.second, wide.first);
      _mm512_store_si512(tile + (step + u) * 32,
                         _mm512_permutexvar_epi16(in_turn, halves));
    }
}

// Tiles 0 to 3: sums of (token tile, block); 4 and 5: tokens; 6 and 7: weights.
template <int TOKEN_TILES>
inline void load_sums(const float* y, bool none) {
  constexpr int64_t stride = WIDTH * sizeof(float);
  if (none) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    return;
  }
  _tile_loadd(0, y, stride);
  _tile_loadd(1, y + BLOCK, stride);
  if (TOKEN_TILES == 2) {
    _tile_loadd(2, y + ROWS * WIDTH, stride);
    _tile_loadd(3, y + ROWS * WIDTH + BLOCK, stride);
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

// x points at a tile of tokens; the tile of the next 16 tokens is next_tokens behind it.
template <int TOKEN_TILES>
inline void multiply(const uint16_t* x, int64_t next_tokens, const uint16_t* weights) {
  written();
  _tile_loadd(6, weights, 64);
  _tile_loadd(7, weights + TILE, 64);
  _tile_loadd(4, x, 64);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  if (TOKEN_TILES == 2) {
    _tile_loadd(5, x + next_tokens, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// Expands inputs of a pair and multiplies up to 32 tokens by them. The panel keeps all
// tiles, or only two in turn: expanding the next one need not wait for the tile loads.
template <class From, int TOKEN_TILES>
void at_once(From pair[2], int64_t inputs, const uint16_t* x, int64_t next_tokens,
             uint16_t* panel, bool keep, float* y, bool none) {
  load_sums<TOKEN_TILES>(y, none);
  for (int64_t step = 0; step < inputs / STEP; ++step, x += TILE) {
    uint16_t* tiles = panel + (keep ? step : step % 2) * 2 * TILE;
    expand(pair[0], tiles);
    expand(pair[1], tiles + TILE);
    multiply<TOKEN_TILES>(x, next_tokens, tiles);
  }
  store_sums<TOKEN_TILES>(y);
}

template <int TOKEN_TILES>
void from_panel(const uint16_t* panel, int64_t inputs, const uint16_t* x,
                int64_t next_tokens, float* y, bool none) {
  load_sums<TOKEN_TILES>(y, none);
  for (int64_t step = 0; step < inputs / STEP; ++step, panel += 2 * TILE, x += TILE)
    multiply<TOKEN_TILES>(x, next_tokens, panel);
  store_sums<TOKEN_TILES>(y);
}

uint16_t* panel_for(int64_t elements) {
  thread_local std::vector<uint16_t> memory;
  size_t needed = elements + 32;
  if (memory.size() < needed) memory.resize(needed);
  auto address = reinterpret_cast<uintptr_t>(memory.data());
  return reinterpret_cast<uint16_t*>((address + 63) / 64 * 64);
}

template <class From>
void one_pair(const Stream pair[2], const void* x_tiles, int64_t m, int64_t k, float* y) {
  alignas(64) uint16_t tiles[4 * TILE];
  const uint16_t* x = static_cast<const uint16_t*>(x_tiles);
  From at[2] = {From(pair[0]), From(pair[1])};
  if (m <= ROWS)
    at_once<From, 1>(at, k, x, 0, tiles, false, y, true);
  else
    at_once<From, 2>(at, k, x, ROWS * k, tiles, false, y, true);
}

template <class From>
void some_pairs(const Stream* blocks, int64_t pairs, const void* x_tiles, int64_t m,
                int64_t k, float* y, int64_t y_pair) {
  const uint16_t* x = static_cast<const uint16_t*>(x_tiles);
  uint16_t* panels = panel_for(pairs * CHUNK * WIDTH);
  From at[GROUP][2];
  for (int64_t b = 0; b < 2 * pairs; ++b) at[b / 2][b % 2] = From(blocks[b]);
  for (int64_t k0 = 0; k0 < k; k0 += CHUNK) {
    const int64_t inputs = k - k0 < CHUNK ? k - k0 : CHUNK;
    for (int64_t row = 0; row < m; row += 2 * ROWS) {
      const uint16_t* tokens = x + row * k + k0 * ROWS;
      for (int64_t p = 0; p < pairs; ++p) {
        uint16_t* panel = panels + p * CHUNK * WIDTH;
        float* sums = y + p * y_pair + row * WIDTH;
        if (row == 0)
          at_once<From, 2>(at[p], inputs, tokens, ROWS * k, panel, true, sums, k0 == 0);
        else if (m - row > ROWS)
          from_panel<2>(panel, inputs, tokens, ROWS * k, sums, k0 == 0);
        else
          from_panel<1>(panel, inputs, tokens, 0, sums, k0 == 0);
      }
    }
  }
}

}  // namespace

#define MOE_PRUNE_TILES(name, From)                                                    \
  void pair_##name(const Stream pair[2], const void* x_tiles, int64_t, int64_t m,      \
                   int64_t k, float* y) {                                              \
    one_pair<From>(pair, x_tiles, m, k, y);                                            \
  }                                                                                    \
  void pairs_##name(const Stream* blocks, int64_t pairs, const void* x_tiles,          \
                    int64_t m, int64_t k, float* y, int64_t y_pair) {                  \
    some_pairs<From>(blocks, pairs, x_tiles, m, k, y, y_pair);                         \
  }

MOE_PRUNE_TILES(amx, Cursor<Plain>)
MOE_PRUNE_TILES(amx_f8, Cursor<Scaled>)
MOE_PRUNE_TILES(amx_i8, amx::Cursor<Int<8>>)
MOE_PRUNE_TILES(amx_i4, amx::Cursor<Int<4>>)

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

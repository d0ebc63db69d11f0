// Products in FP32, for every type: what AVX-512 can do without dot products of bf16, and
// with many tokens what some processors that have them do faster. Compiled once per
// instruction set, each time into a namespace of its own (MOE_PRUNE_ISA).
// Tokens in registers share each expansion; of more tokens than fit there, all share one
// that stays in the first-level cache.

#include "moe.h"
#include "widening.h"

namespace moe_prune {
namespace MOE_PRUNE_ISA {
namespace {

constexpr int HELD = 12;        // rows of x whose sums fit into registers
constexpr int64_t CHUNK = 256;  // inputs of tokens that are widened at a time
constexpr int64_t PANEL = 128;  // inputs of a pair that are expanded at a time

// Tokens of any type: the code that multiplies is the same for all.
struct Tokens {
  const char* x;
  int64_t stride;  // bytes of a row
  int64_t size;    // bytes of an element
  void (*widen)(const Tokens&, int64_t inputs, float* wide, int64_t wide_stride,
                int64_t rows);

  Tokens from(int64_t row, int64_t input) const {
    return {x + row * stride + input * size, stride, size, widen};
  }
};

template <class T>
void widen(const Tokens& from, int64_t inputs, float* wide, int64_t wide_stride,
           int64_t rows) {
  for (int64_t row = 0; row < rows; ++row) {
    auto x = reinterpret_cast<const T*>(from.x + row * from.stride);
    for (int64_t i = 0; i < inputs; i += 16)
      _mm512_store_ps(wide + row * wide_stride + i, inputs_of(x + i));
  }
}

// Sums of M rows and a pair in registers. With few rows, CHAINS of them hide the latency.
template <int M>
struct Sums {
  static constexpr int CHAINS = M == 1 ? 4 : M <= 3 ? 2 : 1;
  __m512 held[CHAINS][2][M];

  void clear() {
    for (auto& chain : held)
      for (auto& block : chain)
        for (auto& row : block) row = _mm512_setzero_ps();
  }

  // One input; x: that of the first row, times the scales of the two blocks if they have
  // any, else the same twice.
  void add(int chain, const float* x_left, const float* x_right, int64_t x_stride,
           __m512 left, __m512 right) {
    for (int row = 0; row < M; ++row) {
      __m512(&sums)[2][M] = held[chain % CHAINS];
      sums[0][row] =
          _mm512_fmadd_ps(_mm512_set1_ps(x_left[row * x_stride]), left, sums[0][row]);
      sums[1][row] =
          _mm512_fmadd_ps(_mm512_set1_ps(x_right[row * x_stride]), right, sums[1][row]);
    }
  }

  void add_to(float* y) const {
    for (int row = 0; row < M; ++row)
      for (int b = 0; b < 2; ++b) {
        float* target = y + row * WIDTH + b * BLOCK;
        __m512 total = _mm512_loadu_ps(target);
        for (auto& chain : held) total = _mm512_add_ps(total, chain[b][row]);
        _mm512_storeu_ps(target, total);
      }
  }
};

// Some inputs from k0 on times the scales of a block.
template <class V>
void scale(const Stream& block, int64_t k0, int64_t inputs, const float* x, float* scaled) {
  for (int64_t i = 0; i < inputs; i += 16) {
    const float factor = block.scales[(k0 + i) / STEP] * Stored<V>::FACTOR;
    _mm512_store_ps(scaled + i, _mm512_mul_ps(_mm512_set1_ps(factor), _mm512_load_ps(x + i)));
  }
}

// M rows of x as weights are expanded; y is added to.
template <class V, int M>
void rows(const Stream pair[2], const Tokens& x, int64_t k, float* y) {
  Cursor<V> left(pair[0]), right(pair[1]);
  alignas(64) float wide[M * CHUNK], other[SCALED<V> ? M * CHUNK : 1];
  const float* wide_right = SCALED<V> ? other : wide;
  for (int64_t k0 = 0; k0 < k; k0 += CHUNK) {
    const int64_t inputs = k - k0 < CHUNK ? k - k0 : CHUNK;
    x.widen(x.from(0, k0), inputs, wide, CHUNK, M);
    if constexpr (SCALED<V>)
      for (int64_t row = 0; row < M * CHUNK; row += CHUNK) {
        scale<V>(pair[1], k0, inputs, wide + row, other + row);
        scale<V>(pair[0], k0, inputs, wide + row, wide + row);
      }
    Sums<M> sums;
    sums.clear();
    for (int64_t i = 0; i < inputs; i += 8)
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) {
        const int64_t step = (k0 + i) >> 1, at = i + 2 * u;
        const Two a = left.expanded(step, u), b = right.expanded(step, u);
        sums.add(2 * u, wide + at, wide_right + at, CHUNK, a.first, b.first);
        sums.add(2 * u + 1, wide + at + 1, wide_right + at + 1, CHUNK, a.second, b.second);
      }
    sums.add_to(y);
  }
}

// M rows, widened, by a panel [inputs][WIDTH].
template <int M>
void dense_rows(const float* panel, int64_t inputs, const float* wide, float* y) {
  Sums<M> sums;
  sums.clear();
  for (int64_t i = 0; i < inputs; i += 4, panel += 4 * WIDTH)
    for (int u = 0; u < 4; ++u)
      sums.add(u, wide + i + u, wide + i + u, PANEL, _mm512_load_ps(panel + u * WIDTH),
               _mm512_load_ps(panel + u * WIDTH + BLOCK));
  sums.add_to(y);
}

using DenseRows = void (*)(const float*, int64_t, const float*, float*);
constexpr DenseRows DENSE_ROWS[HELD + 1] = {
    nullptr,        dense_rows<1>,  dense_rows<2>, dense_rows<3>, dense_rows<4>,
    dense_rows<5>,  dense_rows<6>,  dense_rows<7>, dense_rows<8>, dense_rows<9>,
    dense_rows<10>, dense_rows<11>, dense_rows<12>};

// Values from a step on times the scale that they have in common.
template <class V>
Two scaled(Two values, const Stream& block, int64_t step) {
  if constexpr (SCALED<V>) {
    const __m512 factor =
        _mm512_set1_ps(block.scales[2 * step / STEP] * Stored<V>::FACTOR);
    return {_mm512_mul_ps(values.first, factor), _mm512_mul_ps(values.second, factor)};
  }
  return values;
}

template <class V>
void many_rows(const Stream pair[2], const Tokens& x, int64_t m, int64_t k, float* y) {
  alignas(64) float panel[PANEL * WIDTH], wide[HELD * PANEL];
  Cursor<V> left(pair[0]), right(pair[1]);
  // As even as possible: a last group of one row would use the panel badly.
  const int64_t groups = (m + HELD - 1) / HELD;
  for (int64_t k0 = 0; k0 < k; k0 += PANEL) {
    const int64_t inputs = k - k0 < PANEL ? k - k0 : PANEL;
    for (int64_t i = 0; i < inputs; i += 8)
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) {
        const int64_t step = (k0 + i) >> 1;
        const Two a = scaled<V>(left.expanded(step, u), pair[0], step),
                  b = scaled<V>(right.expanded(step, u), pair[1], step);
        float* target = panel + (i + 2 * u) * WIDTH;
        _mm512_store_ps(target, a.first);
        _mm512_store_ps(target + BLOCK, b.first);
        _mm512_store_ps(target + WIDTH, a.second);
        _mm512_store_ps(target + WIDTH + BLOCK, b.second);
      }
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t row = group * m / groups, end = (group + 1) * m / groups;
      x.widen(x.from(row, k0), inputs, wide, PANEL, end - row);
      DENSE_ROWS[end - row](panel, inputs, wide, y + row * WIDTH);
    }
  }
}

template <class V>
void pair_of(const Stream blocks[2], const Tokens& x, int64_t m, int64_t k, float* y) {
  using Rows = void (*)(const Stream*, const Tokens&, int64_t, float*);
  constexpr Rows ROWS_OF[HELD + 1] = {
      nullptr,    rows<V, 1>, rows<V, 2>,  rows<V, 3>,  rows<V, 4>,
      rows<V, 5>, rows<V, 6>, rows<V, 7>,  rows<V, 8>,  rows<V, 9>,
      rows<V, 10>, rows<V, 11>, rows<V, 12>};
  for (int64_t i = 0; i < m * WIDTH; ++i) y[i] = 0;
  if (m <= HELD)
    ROWS_OF[m](blocks, x, k, y);
  else
    many_rows<V>(blocks, x, m, k, y);
}

// T: what tokens are, V: what weights are.
template <class T, class V>
void pair(const Stream blocks[2], const void* x, int64_t x_stride, int64_t m, int64_t k,
          float* y) {
  constexpr int64_t size = sizeof(T);
  const Tokens tokens{static_cast<const char*>(x), x_stride * size, size, widen<T>};
  pair_of<V>(blocks, tokens, m, k, y);
}

}  // namespace

MOE_PRUNE_PAIRS(Bf16, bf16)
MOE_PRUNE_PAIRS(F16, f16)
MOE_PRUNE_PAIRS(F32, f32)
#ifndef __AVX512VBMI2__  // which integers have no use for
MOE_PRUNE_INT_PAIRS(Bf16, bf16)
MOE_PRUNE_INT_PAIRS(F16, f16)
MOE_PRUNE_INT_PAIRS(F32, f32)
#endif

}  // namespace MOE_PRUNE_ISA
}  // namespace moe_prune

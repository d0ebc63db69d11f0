// AVX-512 with VBMI2 and BF16: VPEXPANDW puts the stored values of 16 outputs and two
// inputs where VDPBF16PS wants them. Tokens in registers share each expansion; of more
// tokens than fit there, all share one that stays in the first-level cache.

#include "expansion.h"

namespace moe_prune {
namespace {

constexpr int HELD = 12;        // rows of x whose sums fit into registers
constexpr int64_t CHUNK = 256;  // inputs of a pair that are expanded at a time

inline __m512bh two_inputs(const uint16_t* x) {
  return (__m512bh)_mm512_set1_epi32(*reinterpret_cast<const int32_t*>(x));
}

// M rows of x at once; with few of them, UNROLL chains of sums hide the latency.
template <class V, int M, int UNROLL>
void rows(const Stream pair[2], const uint16_t* x, int64_t x_stride, int64_t k,
          float* y) {
  Cursor<V> at[2] = {Cursor<V>(pair[0]), Cursor<V>(pair[1])};
  __m512 sum[UNROLL][2][M];
  for (auto& chain : sum)
    for (auto& block : chain)
      for (auto& row : block) row = _mm512_setzero_ps();
  for (int64_t step = 0; step < k / 2; step += UNROLL) {
    for (int b = 0; b < 2; ++b) {
      if (step % 2 == 0) at[b].prefetch();
      for (int u = 0; u < UNROLL; ++u) {
        auto weights = (__m512bh)at[b].expanded(step + u);
        for (int row = 0; row < M; ++row)
          sum[u][b][row] = _mm512_dpbf16_ps(
              sum[u][b][row], weights, two_inputs(x + row * x_stride + 2 * (step + u)));
      }
    }
  }
  for (int row = 0; row < M; ++row)
    for (int b = 0; b < 2; ++b) {
      __m512 total = sum[0][b][row];
      for (int u = 1; u < UNROLL; ++u) total = _mm512_add_ps(total, sum[u][b][row]);
      _mm512_storeu_ps(y + row * WIDTH + b * BLOCK, total);
    }
}

// The same for M rows and a panel [steps][2][BLOCK][2], on top of what y holds.
template <int M>
void dense_rows(const uint16_t* panel, int64_t steps, const uint16_t* x,
                int64_t x_stride, float* y) {
  __m512 sum[2][M];
  for (int row = 0; row < M; ++row)
    for (int b = 0; b < 2; ++b) sum[b][row] = _mm512_loadu_ps(y + row * WIDTH + b * BLOCK);
  for (int64_t step = 0; step < steps; ++step, panel += 4 * BLOCK) {
    auto first = (__m512bh)_mm512_load_si512(panel);
    auto second = (__m512bh)_mm512_load_si512(panel + 2 * BLOCK);
    for (int row = 0; row < M; ++row) {
      __m512bh inputs = two_inputs(x + row * x_stride + 2 * step);
      sum[0][row] = _mm512_dpbf16_ps(sum[0][row], first, inputs);
      sum[1][row] = _mm512_dpbf16_ps(sum[1][row], second, inputs);
    }
  }
  for (int row = 0; row < M; ++row)
    for (int b = 0; b < 2; ++b) _mm512_storeu_ps(y + row * WIDTH + b * BLOCK, sum[b][row]);
}

using DenseRows = void (*)(const uint16_t*, int64_t, const uint16_t*, int64_t, float*);
constexpr DenseRows DENSE_ROWS[HELD + 1] = {
    nullptr,       dense_rows<1>, dense_rows<2>,  dense_rows<3>,  dense_rows<4>,
    dense_rows<5>, dense_rows<6>, dense_rows<7>,  dense_rows<8>,  dense_rows<9>,
    dense_rows<10>, dense_rows<11>, dense_rows<12>};

template <class V>
void many_rows(const Stream pair[2], const uint16_t* x, int64_t x_stride, int64_t m,
               int64_t k, float* y) {
  alignas(64) uint16_t panel[CHUNK * WIDTH];
  Cursor<V> at[2] = {Cursor<V>(pair[0]), Cursor<V>(pair[1])};
  for (int64_t i = 0; i < m * WIDTH; ++i) y[i] = 0;
  // As even as possible: a last group of one row would use the panel badly.
  const int64_t groups = (m + HELD - 1) / HELD;
  for (int64_t k0 = 0; k0 < k; k0 += CHUNK) {
    const int64_t steps = (k - k0 < CHUNK ? k - k0 : CHUNK) / 2;
    for (int64_t step = 0; step < steps; ++step)
      for (int b = 0; b < 2; ++b) {
        if (step % 2 == 0) at[b].prefetch();
        _mm512_store_si512(panel + (2 * step + b) * 2 * BLOCK,
                           at[b].expanded(k0 / 2 + step));
      }
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t row = group * m / groups, end = (group + 1) * m / groups;
      DENSE_ROWS[end - row](panel, steps, x + row * x_stride + k0, x_stride,
                            y + row * WIDTH);
    }
  }
}

template <class V>
void all_rows(const Stream pair[2], const void* x_bytes, int64_t x_stride, int64_t m,
              int64_t k, float* y) {
  const uint16_t* x = static_cast<const uint16_t*>(x_bytes);
  switch (m) {
    case 1: return rows<V, 1, 4>(pair, x, x_stride, k, y);
    case 2: return rows<V, 2, 2>(pair, x, x_stride, k, y);
    case 3: return rows<V, 3, 2>(pair, x, x_stride, k, y);
    case 4: return rows<V, 4, 2>(pair, x, x_stride, k, y);
    case 5: return rows<V, 5, 1>(pair, x, x_stride, k, y);
    case 6: return rows<V, 6, 1>(pair, x, x_stride, k, y);
    case 7: return rows<V, 7, 1>(pair, x, x_stride, k, y);
    case 8: return rows<V, 8, 1>(pair, x, x_stride, k, y);
    case 9: return rows<V, 9, 1>(pair, x, x_stride, k, y);
    case 10: return rows<V, 10, 1>(pair, x, x_stride, k, y);
    case 11: return rows<V, 11, 1>(pair, x, x_stride, k, y);
    case 12: return rows<V, 12, 1>(pair, x, x_stride, k, y);
    default: return many_rows<V>(pair, x, x_stride, m, k, y);
  }
}

}  // namespace

void pair_expand(const Stream pair[2], const void* x, int64_t x_stride, int64_t m,
                 int64_t k, float* y) {
  all_rows<Plain>(pair, x, x_stride, m, k, y);
}

void pair_expand_f8(const Stream pair[2], const void* x, int64_t x_stride, int64_t m,
                    int64_t k, float* y) {
  all_rows<Scaled>(pair, x, x_stride, m, k, y);
}

}  // namespace moe_prune

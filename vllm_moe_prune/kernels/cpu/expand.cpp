// AVX-512 with VBMI2 and BF16: VPEXPANDW puts the stored values of 16 outputs and two
// inputs where VDPBF16PS wants them. Tokens in registers share each expansion.

#include <immintrin.h>

#include "moe.h"

namespace moe_prune {
namespace {

// Ahead of the values being expanded; the hardware prefetcher stops at every page.
constexpr int AHEAD = 1024;

inline __m512bh expanded(uint32_t mask, const uint16_t*& values) {
  __m512i packed = _mm512_loadu_si512(values);
  values += __builtin_popcount(mask);
  return (__m512bh)_mm512_maskz_expand_epi16(mask, packed);
}

inline __m512bh two_inputs(const uint16_t* x) {
  return (__m512bh)_mm512_set1_epi32(*reinterpret_cast<const int32_t*>(x));
}

// M rows of x at once; with few of them, UNROLL chains of sums hide the latency.
template <int M, int UNROLL>
void rows(const Stream pair[2], const uint16_t* x, int64_t x_stride, int64_t k,
          float* y) {
  const uint16_t* values[2] = {static_cast<const uint16_t*>(pair[0].values),
                               static_cast<const uint16_t*>(pair[1].values)};
  const uint32_t* masks[2] = {pair[0].masks, pair[1].masks};
  __m512 sum[UNROLL][2][M];
  for (auto& chain : sum)
    for (auto& block : chain)
      for (auto& row : block) row = _mm512_setzero_ps();
  for (int64_t step = 0; step < k / 2; step += UNROLL) {
    for (int b = 0; b < 2; ++b) {
      if (step % 2 == 0)
        _mm_prefetch(reinterpret_cast<const char*>(values[b]) + AHEAD, _MM_HINT_T0);
      for (int u = 0; u < UNROLL; ++u) {
        __m512bh weights = expanded(masks[b][step + u], values[b]);
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

}  // namespace

void pair_expand(const Stream pair[2], const void* x_bytes, int64_t x_stride, int64_t m,
                 int64_t k, float* y) {
  const uint16_t* x = static_cast<const uint16_t*>(x_bytes);
  while (m > 0) {
    int64_t now = m >= 8 ? 8 : m;
    switch (now) {
      case 1: rows<1, 4>(pair, x, x_stride, k, y); break;
      case 2: rows<2, 2>(pair, x, x_stride, k, y); break;
      case 3: rows<3, 2>(pair, x, x_stride, k, y); break;
      case 4: rows<4, 2>(pair, x, x_stride, k, y); break;
      case 5: rows<5, 1>(pair, x, x_stride, k, y); break;
      case 6: rows<6, 1>(pair, x, x_stride, k, y); break;
      case 7: rows<7, 1>(pair, x, x_stride, k, y); break;
      default: rows<8, 1>(pair, x, x_stride, k, y); break;
    }
    x += now * x_stride;
    y += now * WIDTH;
    m -= now;
  }
}

}  // namespace moe_prune

// Products by whatever instructions there are; compiled for the portable path and for
// AVX2, each time into a namespace of its own (MOE_PRUNE_ISA), and vectorised by the
// compiler.

#include <cstring>

#include "moe.h"
#include "types.h"

namespace moe_prune {
namespace MOE_PRUNE_ISA {
namespace {

// A weight as it is, or of e4m3 times its scale, rounded to the type of tokens.
template <class T>
float weight(T value, const float*) {
  return value;
}

template <class T>
float weight(F8 value, const float* scale) {
  return T::of(value * *scale);
}

// STEP inputs of one block into panel[input][column0 + output].
template <class T, class V>
const V* expand(const uint32_t* masks, const V* values, const float* scale,
                float (*panel)[WIDTH], int column0) {
  for (int step = 0; step < STEP / 2; ++step) {
    for (uint32_t mask = masks[step]; mask != 0; mask &= mask - 1) {
      int lane = __builtin_ctz(mask);
      panel[2 * step + (lane & 1)][column0 + (lane >> 1)] = weight<T>(*values++, scale);
    }
  }
  return values;
}

// T: what tokens are, V: what weights are.
template <class T, class V>
void pair(const Stream blocks[2], const void* x_bytes, int64_t x_stride, int64_t m,
          int64_t k, float* y) {
  const T* x = static_cast<const T*>(x_bytes);
  const V* values[2] = {static_cast<const V*>(blocks[0].values),
                        static_cast<const V*>(blocks[1].values)};
  std::memset(y, 0, sizeof(float) * m * WIDTH);
  float panel[STEP][WIDTH];
  for (int64_t k0 = 0; k0 < k; k0 += STEP) {
    std::memset(panel, 0, sizeof panel);
    for (int b = 0; b < 2; ++b) {
      const float* scale = blocks[b].scales ? blocks[b].scales + k0 / STEP : nullptr;
      values[b] = expand<T>(blocks[b].masks + k0 / 2, values[b], scale, panel, b * BLOCK);
    }
    for (int64_t row = 0; row < m; ++row) {
      float sum[WIDTH];
      std::memcpy(sum, y + row * WIDTH, sizeof sum);
      const T* inputs = x + row * x_stride + k0;
      for (int i = 0; i < STEP; ++i) {
        float input = inputs[i];
        for (int n = 0; n < WIDTH; ++n) sum[n] += input * panel[i][n];
      }
      std::memcpy(y + row * WIDTH, sum, sizeof sum);
    }
  }
}

}  // namespace

MOE_PRUNE_PAIRS(Bf16, bf16)
MOE_PRUNE_PAIRS(F16, f16)
MOE_PRUNE_PAIRS(F32, f32)

}  // namespace MOE_PRUNE_ISA
}  // namespace moe_prune

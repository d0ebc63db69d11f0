// The path that needs no particular instructions; compiled once per instruction set,
// each time into a namespace of its own (MOE_PRUNE_ISA), and vectorised by the compiler.

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

// exp for x <= 0 to two units of the last place; 0 below -87. Plain arithmetic, so that
// the compiler can do many at once.
inline float exp_of_negative(float x) {
  float safe = x > -87.0f ? x : -87.0f;
  float shifted = safe * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  float whole = shifted - 12582912.0f;
  float rest = safe - whole * 0.693145752f - whole * 1.42860677e-6f;
  float power = 1.0f / 5040;
  power = power * rest + 1.0f / 720;
  power = power * rest + 1.0f / 120;
  power = power * rest + 1.0f / 24;
  power = power * rest + 1.0f / 6;
  power = power * rest + 0.5f;
  power = power * rest + 1.0f;
  power = power * rest + 1.0f;
  float scale = as_float((as_bits(shifted) + 127) << 23);
  return x > -87.0f ? power * scale : 0.0f;
}

template <class T>
void activate(const float* y, int64_t m, void* h_bytes, int64_t h_stride) {
  T* h = static_cast<T*>(h_bytes);
  for (int64_t row = 0; row < m; ++row, y += WIDTH, h += h_stride) {
    for (int n = 0; n < BLOCK; ++n) {
      float gate = y[n];
      // Of both signs, exp is taken of the negative one and cannot overflow.
      float power = exp_of_negative(gate < 0 ? gate : -gate);
      float sigmoid = (gate < 0 ? power : 1.0f) / (1.0f + power);
      h[n] = T::of(gate * sigmoid * y[BLOCK + n]);
    }
  }
}

}  // namespace

#define MOE_PRUNE_TYPE(name, T)                                                        \
  void pair_##name(const Stream blocks[2], const void* x, int64_t stride, int64_t m,   \
                   int64_t k, float* y) {                                              \
    pair<T, T>(blocks, x, stride, m, k, y);                                            \
  }                                                                                    \
  void pair_f8_##name(const Stream blocks[2], const void* x, int64_t stride,           \
                      int64_t m, int64_t k, float* y) {                                \
    pair<T, F8>(blocks, x, stride, m, k, y);                                           \
  }                                                                                    \
  void activate_##name(const float* y, int64_t m, void* h, int64_t stride) {           \
    activate<T>(y, m, h, stride);                                                      \
  }

MOE_PRUNE_TYPE(bf16, Bf16)
MOE_PRUNE_TYPE(f16, F16)
MOE_PRUNE_TYPE(f32, F32)

}  // namespace MOE_PRUNE_ISA
}  // namespace moe_prune

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

// Where the next inputs of a block are. T: what tokens are, V: what weights are.
template <class T, class V>
struct Source {
  const uint32_t* masks;
  const V* values;
  const float* scales;

  explicit Source(const Stream& from)
      : masks(from.masks), values(static_cast<const V*>(from.values)), scales(from.scales) {}

  // STEP inputs from k0 on into panel[input][column0 + output].
  void expand(int64_t k0, float (*panel)[WIDTH], int column0) {
    const float* scale = scales ? scales + k0 / STEP : nullptr;
    for (int step = 0; step < STEP / 2; ++step) {
      for (uint32_t mask = masks[k0 / 2 + step]; mask != 0; mask &= mask - 1) {
        int lane = __builtin_ctz(mask);
        panel[2 * step + (lane & 1)][column0 + (lane >> 1)] = weight<T>(*values++, scale);
      }
    }
  }
};

inline float factor(const Stream& from, int64_t at) {
  switch (from.factor_type) {
    case AS_BF16: return static_cast<const Bf16*>(from.factors)[at];
    case AS_F16: return static_cast<const F16*>(from.factors)[at];
    default: return static_cast<const float*>(from.factors)[at];
  }
}

template <class T, int BITS>
struct Source<T, Int<BITS>> {
  const Stream& from;

  explicit Source(const Stream& from) : from(from) {}

  void expand(int64_t k0, float (*panel)[WIDTH], int column0) {
    constexpr int FIELDS = 32 / BITS;
    float scale[BLOCK], offset[BLOCK] = {};
    for (int i = 0; i < STEP; ++i) {
      const int64_t input = k0 + i;
      if (i == 0 || input % from.group == 0)
        for (int n = 0; n < BLOCK; ++n) {
          const int64_t at = input / from.group * BLOCK + n;
          scale[n] = factor(from, at);
          if (from.zeros) offset[n] = -(static_cast<float>(from.zeros[at]) * scale[n]);
        }
      auto words = static_cast<const uint32_t*>(from.values) + input / FIELDS * BLOCK;
      const int shift = static_cast<int>(input % FIELDS) * BITS;
      for (int n = 0; n < BLOCK; ++n) {
        const uint32_t field = words[n] >> shift & ((1 << BITS) - 1);
        // Four bits count from the lowest value, eight have a sign.
        const int32_t value = BITS == 4 ? static_cast<int32_t>(field) - 8
                                        : static_cast<int8_t>(field);
        panel[i][column0 + n] = static_cast<float>(value) * scale[n] + offset[n];
      }
    }
  }
};

template <class T, class V>
void pair(const Stream blocks[2], const void* x_bytes, int64_t x_stride, int64_t m,
          int64_t k, float* y) {
  const T* x = static_cast<const T*>(x_bytes);
  Source<T, V> source[2] = {Source<T, V>(blocks[0]), Source<T, V>(blocks[1])};
  std::memset(y, 0, sizeof(float) * m * WIDTH);
  float panel[STEP][WIDTH];
  for (int64_t k0 = 0; k0 < k; k0 += STEP) {
    std::memset(panel, 0, sizeof panel);
    for (int b = 0; b < 2; ++b) source[b].expand(k0, panel, b * BLOCK);
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
MOE_PRUNE_INT_PAIRS(Bf16, bf16)
MOE_PRUNE_INT_PAIRS(F16, f16)
MOE_PRUNE_INT_PAIRS(F32, f32)

}  // namespace MOE_PRUNE_ISA
}  // namespace moe_prune

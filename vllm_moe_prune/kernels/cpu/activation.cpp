// SiLU of the gate times up. Compiled once per instruction set, each time into a namespace
// of its own (MOE_PRUNE_ISA), and vectorised by the compiler.

#include "moe.h"
#include "types.h"

namespace moe_prune {
namespace MOE_PRUNE_ISA {
namespace {

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

#define MOE_PRUNE_ACTIVATION(T, name)                                                  \
  void activate_##name(const float* y, int64_t m, void* h, int64_t stride) {           \
    activate<T>(y, m, h, stride);                                                      \
  }

MOE_PRUNE_ACTIVATION(Bf16, bf16)
MOE_PRUNE_ACTIVATION(F16, f16)
MOE_PRUNE_ACTIVATION(F32, f32)

}  // namespace MOE_PRUNE_ISA
}  // namespace moe_prune

// The C interface for running a linear layer of integers.

#include <omp.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "paths.h"
#include "types.h"
#include "weights.h"

using namespace moe_prune;

namespace {

constexpr int64_t TOKENS = 512;  // that are multiplied by a pair at a time

// From fp32 to tokens of a type.
void store(const float* from, int64_t count, void* to, int64_t at, int32_t type) {
  for (int64_t n = 0; n < count; ++n) switch (type) {
      case AS_BF16: static_cast<Bf16*>(to)[at + n] = Bf16::of(from[n]); break;
      case AS_F16: static_cast<F16*>(to)[at + n] = F16::of(from[n]); break;
      default: static_cast<float*>(to)[at + n] = from[n];
    }
}

}  // namespace

extern "C" {

// The arguments of moe_prune_linear; kernels/cpu_linear.py has the same list.
struct MoePruneLinear {
  const void* x;       // [tokens][inputs]
  const void* values;  // as those of one expert's down projection
  const void* scales;
  const int8_t* zeros;  // null: none
  void* out;            // [tokens][outputs]
  int64_t tokens, inputs, outputs, group, scale_type;
  int64_t threads;  // 0: as many as OpenMP would use
  int32_t type, storage, level, dots;
};

void moe_prune_linear(const MoePruneLinear* linear) {
  const MoePruneLinear& p = *linear;
  const int64_t k = round_up(p.inputs, STEP), bytes = element_bytes(p.type);
  const int64_t pairs = round_up(p.outputs, WIDTH) / WIDTH;
  const Weights w{nullptr, nullptr, p.values, p.scales, p.zeros, p.group,
                  p.scale_type, 2 * pairs, k, p.storage == INT4 ? 4 : 8};
  const Rounding rounded = rounding(p.dots, p.storage);
  const PairKernel kernel =
      rounded.round ? rounded.pair : any(p.level, p.type, p.storage).pair;
  // In bytes between rows; kernels count rows that are not rounded in elements.
  const int64_t stride = rounded.round ? Rounded::stride(k) : (k + STEP) * bytes;
  const int64_t step = rounded.round ? stride : k + STEP;
  const Scratch rows(p.tokens * stride);
  const int64_t threads = p.threads ? p.threads : omp_get_max_threads();

#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    std::vector<float> y(std::min(p.tokens, TOKENS) * WIDTH);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < p.tokens; ++row) {
      auto token = static_cast<const char*>(p.x) + row * p.inputs * bytes;
      char* target = rows.data + row * stride;
      if (rounded.round) {
        rounded.round(token, p.type, p.inputs, k, 0, k, target);
      } else {
        std::memcpy(target, token, p.inputs * bytes);
        std::memset(target + p.inputs * bytes, 0, (k - p.inputs) * bytes);
      }
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t index = 0; index < pairs; ++index) {
      Stream blocks[2];
      w.pair(0, index, blocks);
      const int64_t column = index * WIDTH;
      const int64_t held = std::min<int64_t>(WIDTH, p.outputs - column);
      for (int64_t row = 0; row < p.tokens; row += TOKENS) {
        const int64_t some = std::min(TOKENS, p.tokens - row);
        kernel(blocks, rows.data + row * stride, step, some, k, y.data());
        for (int64_t i = 0; i < some; ++i)
          store(y.data() + i * WIDTH, held, p.out, (row + i) * p.outputs + column, p.type);
      }
    }
  }
}

}  // extern "C"

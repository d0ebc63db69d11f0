// What both C interfaces that multiply have in common: where weights are, and memory.

#pragma once

#include <new>

#include "moe.h"

namespace moe_prune {

inline int64_t element_bytes(int64_t type) { return type == AS_F32 ? 4 : 2; }

// A layer's weights: [experts][blocks][k / 2] masks, [experts][blocks + 1] starts,
// [experts][blocks][k / STEP] scales, if any. Integers have neither masks nor starts, and
// [experts][blocks][k / group][BLOCK] scales of a type and zero points, if any.
struct Weights {
  const uint32_t* masks;
  const int64_t* starts;
  const void* values;
  const void* scales;
  const int8_t* zeros;
  int64_t group;
  int64_t scale_type;
  int64_t blocks;
  int64_t k;
  int64_t bits;  // of a value

  void pair(int64_t expert, int64_t index, Stream found[2]) const {
    for (int b = 0; b < 2; ++b) {
      const int64_t block = 2 * index + b, number = expert * blocks + block;
      const int64_t start =
          masks ? starts[expert * (blocks + 1) + block] : number * BLOCK * k;
      found[b] = {};
      found[b].values = static_cast<const char*>(values) + start * bits / 8;
      if (masks) {
        found[b].masks = masks + number * (k / 2);
        if (scales)
          found[b].scales = static_cast<const float*>(scales) + number * (k / STEP);
      } else {
        const int64_t shared = number * (k / group) * BLOCK;
        found[b].factor_type = static_cast<int32_t>(scale_type);
        found[b].factors =
            static_cast<const char*>(scales) + shared * element_bytes(scale_type);
        if (zeros) found[b].zeros = zeros + shared;
        found[b].group = group;
      }
    }
  }
};

// Memory on a cache line of its own, not initialised.
struct Scratch {
  char* data;
  explicit Scratch(int64_t bytes)
      : data(static_cast<char*>(::operator new(bytes + 64, std::align_val_t(64)))) {}
  ~Scratch() { ::operator delete(data, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

}  // namespace moe_prune

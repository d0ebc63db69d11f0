// Which of the kernels run.

#pragma once

#include "moe.h"

namespace moe_prune {

struct Kernels {
  PairKernel pair;
  ActivationKernel activate;
};

// For tokens of any type. Of bf16 there are others too, from level BF16 on.
Kernels any(int32_t level, int32_t type, int32_t storage);

// Of tokens rounded to int8; nulls: there are none.
struct Rounding {
  RoundKernel round;
  PairKernel pair;
};

// dots: one of Dots.
Rounding rounding(int32_t dots, int32_t storage);

#ifdef MOE_PRUNE_AMX
struct Tiles {
  PairKernel pair;
  PairsKernel pairs;
};

constexpr Tiles TILES[] = {{pair_amx, pairs_amx},
                           {pair_amx_f8, pairs_amx_f8},
                           {pair_amx_i8, pairs_amx_i8},
                           {pair_amx_i4, pairs_amx_i4}};  // in the order of Storage
#endif

}  // namespace moe_prune

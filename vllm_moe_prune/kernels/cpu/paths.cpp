// The C interface that tells which instructions there are, and which kernels are for them.

#include "paths.h"

#ifdef MOE_PRUNE_X86
#include <cpuid.h>
#endif

using namespace moe_prune;

namespace {

#ifdef MOE_PRUNE_X86
// What __builtin_cpu_supports has no name for in every compiler; words are EAX to EDX.
bool has_bit(uint32_t leaf, uint32_t subleaf, int word, int bit) {
  uint32_t words[4] = {};
  return __get_cpuid_count(leaf, subleaf, words, words + 1, words + 2, words + 3) &&
         (words[word] >> bit & 1);
}
#endif

int32_t find_level() {
#ifdef MOE_PRUNE_X86
  __builtin_cpu_init();
  auto has = [](bool feature) { return feature; };
  bool avx2 = has(__builtin_cpu_supports("avx2")) && has(__builtin_cpu_supports("fma")) &&
              has_bit(1, 0, 2, 29);  // F16C
  bool avx512 = avx2 && has(__builtin_cpu_supports("avx512f")) &&
                has(__builtin_cpu_supports("avx512bw")) &&
                has(__builtin_cpu_supports("avx512vl")) &&
                has(__builtin_cpu_supports("avx512dq"));
  bool vbmi2 = avx512 && has(__builtin_cpu_supports("avx512vbmi2"));
#ifdef MOE_PRUNE_BF16
  if (vbmi2 && has_bit(7, 1, 0, 5)) {  // AVX512-BF16
#ifdef MOE_PRUNE_AMX
    bool tiles = has_bit(7, 0, 3, 24) && has_bit(7, 0, 3, 22);  // AMX-TILE, AMX-BF16
    if (tiles && amx_allowed()) return AMX;
#endif
    return BF16;
  }
#endif
  if (vbmi2) return VBMI2;
  if (avx512) return AVX512;
  if (avx2) return AVX2;
#endif
  return PORTABLE;
}

int32_t find_dots() {
  int32_t found = NO_DOTS;
#ifdef MOE_PRUNE_X86
  const int32_t level = moe_prune_level();
  if (level >= AVX2) found |= DOTS_AVX2;
#ifdef MOE_PRUNE_AVXVNNI
  if (level >= AVX2 && has_bit(7, 1, 0, 4)) found |= DOTS_AVXVNNI;
#endif
  if (level >= AVX512 && has_bit(7, 0, 2, 11)) found |= DOTS_AVX512VNNI;
#endif
  return found;
}

#define MOE_PRUNE_OF_TYPE(pairs, kind, act)                       \
  switch (type) {                                                 \
    case AS_BF16: return {pairs::kind##bf16, act::activate_bf16}; \
    case AS_F16: return {pairs::kind##f16, act::activate_f16};    \
    default: return {pairs::kind##f32, act::activate_f32};        \
  }
#define MOE_PRUNE_PICK(pairs, ints, act)                           \
  switch (storage) {                                               \
    case E4M3: MOE_PRUNE_OF_TYPE(pairs, pair_f8_, act)             \
    case INT8: MOE_PRUNE_OF_TYPE(ints, pair_i8_, act)              \
    case INT4: MOE_PRUNE_OF_TYPE(ints, pair_i4_, act)              \
    default: MOE_PRUNE_OF_TYPE(pairs, pair_, act)                  \
  }

}  // namespace

namespace moe_prune {

Kernels any(int32_t level, int32_t type, int32_t storage) {
#ifdef MOE_PRUNE_X86
  // Expanding what has no masks is no faster with VBMI2.
  if (level >= VBMI2) MOE_PRUNE_PICK(vbmi2, avx512, avx512)
  if (level == AVX512) MOE_PRUNE_PICK(avx512, avx512, avx512)
  if (level == AVX2) MOE_PRUNE_PICK(avx2, avx2, avx2)
#endif
  MOE_PRUNE_PICK(portable, portable, portable)
}

Rounding rounding(int32_t dots, int32_t storage) {
#define MOE_PRUNE_ROUNDING(isa)                                       \
  return storage == INT4 ? Rounding{isa::round_i4, isa::dots_i4}       \
                         : Rounding{isa::round_i8, isa::dots_i8};
  switch (dots) {
#ifdef MOE_PRUNE_X86
    case DOTS_AVX512VNNI: MOE_PRUNE_ROUNDING(avx512vnni)
    case DOTS_AVX2: MOE_PRUNE_ROUNDING(avx2)
#endif
#ifdef MOE_PRUNE_AVXVNNI
    case DOTS_AVXVNNI: MOE_PRUNE_ROUNDING(avxvnni)
#endif
    default: return {nullptr, nullptr};
  }
}

}  // namespace moe_prune

extern "C" {

int32_t moe_prune_level() {
  static const int32_t level = find_level();
  return level;
}

int32_t moe_prune_dots() {
  static const int32_t dots = find_dots();
  return dots;
}

}  // extern "C"

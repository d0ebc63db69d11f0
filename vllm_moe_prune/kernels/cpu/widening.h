// 32 stored values of a step as FP32: 16 outputs of its first input, 16 of its second.
// Compiled for AVX-512, or for AVX-512 with VBMI2, where 16-bit and 8-bit values can be
// put in their places before they are widened. Integers are stored all, without masks.

#pragma once

#include <immintrin.h>

#include <cstdint>

#include "moe.h"
#include "types.h"

namespace moe_prune {
namespace MOE_PRUNE_ISA {
namespace {

constexpr int AHEAD = 1024;  // bytes, of values

struct Two {
  __m512 first, second;
};

// Every second lane of both, the even ones and the odd ones.
inline void apart(__m512i low, __m512i high, __m512i& even, __m512i& odd) {
  const __m512i evens = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6,
                                         4, 2, 0);
  even = _mm512_permutex2var_epi32(low, evens, high);
  odd = _mm512_permutex2var_epi32(
      low, _mm512_add_epi32(evens, _mm512_set1_epi32(1)), high);
}

// Values as 32-bit integers in the lanes of the mask. load gives 16 from where it is told.
template <class T, class Load>
inline void placed(uint32_t mask, const T* values, Load load, __m512i& even,
                   __m512i& odd) {
  const uint32_t low = mask & 0xffff, high = mask >> 16;
  apart(_mm512_maskz_expand_epi32(static_cast<__mmask16>(low), load(values)),
        _mm512_maskz_expand_epi32(static_cast<__mmask16>(high),
                                  load(values + __builtin_popcount(low))),
        even, odd);
}

inline __m512i load32(const uint32_t* values) { return _mm512_loadu_si512(values); }

inline __m512i load16(const uint16_t* values) {
  return _mm512_cvtepu16_epi32(
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
}

inline __m512i load8(const uint8_t* values) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
}

// What values are stored as, and as what they are read: e4m3 without its scale, and
// integers with it.
template <class T>
struct Stored;

template <class V>
constexpr bool SCALED = false;
template <>
constexpr bool SCALED<F8> = true;

template <>
struct Stored<F32> {
  using Bits = uint32_t;

  static Two expanded(uint32_t mask, const Bits* values) {
    __m512i even, odd;
    placed(mask, values, load32, even, odd);
    return {_mm512_castsi512_ps(even), _mm512_castsi512_ps(odd)};
  }
};

template <>
struct Stored<Bf16> {
  using Bits = uint16_t;

  static Two expanded(uint32_t mask, const Bits* values) {
    __m512i even, odd;
#ifdef __AVX512VBMI2__
    __m512i both = _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(values));
    even = _mm512_slli_epi32(both, 16);
    odd = _mm512_and_si512(both, _mm512_set1_epi32(-0x10000));
#else
    placed(mask, values, load16, even, odd);
    even = _mm512_slli_epi32(even, 16);
    odd = _mm512_slli_epi32(odd, 16);
#endif
    return {_mm512_castsi512_ps(even), _mm512_castsi512_ps(odd)};
  }
};

template <>
struct Stored<F16> {
  using Bits = uint16_t;

  static Two expanded(uint32_t mask, const Bits* values) {
    __m512i even, odd;
#ifdef __AVX512VBMI2__
    even = _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(values));
    odd = _mm512_srli_epi32(even, 16);
#else
    placed(mask, values, load16, even, odd);
#endif
    return {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(even)),
            _mm512_cvtph_ps(_mm512_cvtepi32_epi16(odd))};
  }
};

// e4m3, 2^-8 as large: its bits in the upper byte of a word, shifted by one, are a number
// of half precision, denormals too.
template <>
struct Stored<F8> {
  using Bits = uint8_t;
  static constexpr float FACTOR = 0x1p8f;

  static Two expanded(uint32_t mask, const Bits* values) {
    __m512i even, odd;
    placed(mask, values, load8, even, odd);
    return {as_floats(_mm256_slli_epi16(_mm512_cvtepi32_epi16(even), 8)),
            as_floats(_mm256_slli_epi16(_mm512_cvtepi32_epi16(odd), 8))};
  }

  // Of what has e4m3 in the upper byte of every word, NaNs apart.
  static __m512i halves(__m512i words) {
    return _mm512_and_si512(_mm512_srai_epi16(words, 1),
                            _mm512_set1_epi16(static_cast<short>(0xbf80)));
  }

  static __m512 as_floats(__m256i words) {
    const __m256i all = _mm256_set1_epi16(0x7f00);
    __mmask16 nan = _mm256_cmpeq_epi16_mask(_mm256_and_si256(words, all), all);
    __m256i half = _mm256_and_si256(_mm256_srai_epi16(words, 1),
                                    _mm256_set1_epi16(static_cast<short>(0xbf80)));
    return _mm512_cvtph_ps(_mm256_mask_mov_epi16(half, nan, _mm256_set1_epi16(0x7e00)));
  }
};

// Where the next step of a block is. Steps are asked for in turn, as a multiple of four
// and a number below four that the compiler knows.
template <class V>
struct Cursor {
  const uint32_t* masks;
  const typename Stored<V>::Bits* values;

  explicit Cursor(const Stream& from)
      : masks(from.masks), values(static_cast<const typename Stored<V>::Bits*>(from.values)) {}

  Two expanded(int64_t fours, int more) {
    const uint32_t mask = masks[fours + more];
    if (more % 2 == 0)
      _mm_prefetch(reinterpret_cast<const char*>(values) + AHEAD, _MM_HINT_T0);
    const Two found = Stored<V>::expanded(mask, values);
    values += __builtin_popcount(mask);
    return found;
  }
};

#ifdef __AVX512VBMI2__
// Two steps are put in their places at once; the second waits in registers.
template <>
struct Cursor<F8> {
  const uint32_t* masks;
  const uint8_t* values;
  __m512i first, second;  // halves of both steps

  explicit Cursor(const Stream& from)
      : masks(from.masks), values(static_cast<const uint8_t*>(from.values)) {}

  Two expanded(int64_t fours, int more) {
    if (more % 2)
      return {_mm512_cvtph_ps(_mm512_extracti64x4_epi64(first, 1)),
              _mm512_cvtph_ps(_mm512_extracti64x4_epi64(second, 1))};
    const uint32_t* two = masks + fours + more;
    const uint64_t mask = two[0] | static_cast<uint64_t>(two[1]) << 32;
    _mm_prefetch(reinterpret_cast<const char*>(values) + AHEAD, _MM_HINT_T0);
    __m512i packed = _mm512_loadu_si512(values);
    asm("" : "+v"(packed));  // expanding straight from memory takes longer
    const __m512i bytes = _mm512_maskz_expand_epi8(mask, packed);
    values += __builtin_popcountll(mask);
    first = Stored<F8>::halves(_mm512_slli_epi16(bytes, 8));
    second = Stored<F8>::halves(bytes);
    const __m512i all = _mm512_set1_epi8(0x7f);
    const __mmask64 nan = _mm512_cmpeq_epi8_mask(_mm512_and_si512(bytes, all), all);
    if (__builtin_expect(nan != 0, 0)) {
      const __m512i here = _mm512_movm_epi8(nan), none = _mm512_set1_epi16(0x7e00);
      first = _mm512_mask_mov_epi16(
          first, _mm512_movepi16_mask(_mm512_slli_epi16(here, 8)), none);
      second = _mm512_mask_mov_epi16(second, _mm512_movepi16_mask(here), none);
    }
    return {_mm512_cvtph_ps(_mm512_castsi512_si256(first)),
            _mm512_cvtph_ps(_mm512_castsi512_si256(second))};
  }
};
#endif

// 16 inputs as FP32.
inline __m512 inputs_of(const Bf16* x) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(load16(reinterpret_cast<const uint16_t*>(x)), 16));
}

inline __m512 inputs_of(const F16* x) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}

inline __m512 inputs_of(const F32* x) { return _mm512_loadu_ps(&x->value); }

inline __m512 factors_of(const char* at, int32_t type) {
  switch (type) {
    case AS_BF16: return inputs_of(reinterpret_cast<const Bf16*>(at));
    case AS_F16: return inputs_of(reinterpret_cast<const F16*>(at));
    default: return inputs_of(reinterpret_cast<const F32*>(at));
  }
}

// Each output has 32 bits of its own: 8 inputs of 4 bits, from -8 on, or 4 of 8, signed.
template <int BITS>
struct Cursor<Int<BITS>> {
  static constexpr int STEPS = 16 / BITS;  // of 32 bits
  const uint32_t* lanes;
  const char* factors;
  const int8_t* zeros;
  int32_t type;
  int64_t group;  // steps that share a scale
  int64_t left;
  __m512 scale, offset;

  Cursor() = default;
  explicit Cursor(const Stream& from)
      : lanes(static_cast<const uint32_t*>(from.values)),
        factors(static_cast<const char*>(from.factors)),
        zeros(from.zeros),
        type(from.factor_type),
        group(from.group / 2),
        left(0) {}

  void next_group() {
    left = group;
    scale = factors_of(factors, type);
    factors += BLOCK * (type == AS_F32 ? 4 : 2);
    if (!zeros) return;
    // (q - z) s = q s + (-z s): one fused multiply-add instead of a subtraction per weight.
    const __m128i found = _mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros));
    offset = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(found)), scale);
    offset = _mm512_sub_ps(_mm512_setzero_ps(), offset);
    zeros += BLOCK;
  }

  Two expanded(int64_t, int more) {
    if (left == 0) next_group();
    --left;
    const int within = more % STEPS;
    __m512i packed = _mm512_loadu_si512(lanes);
    if (within == 0) _mm_prefetch(lanes + AHEAD / 4, _MM_HINT_T0);
    if (within == STEPS - 1) lanes += BLOCK;
    __m512 first = value(packed, 2 * within), second = value(packed, 2 * within + 1);
    if (!zeros) return {_mm512_mul_ps(first, scale), _mm512_mul_ps(second, scale)};
    return {_mm512_fmadd_ps(first, scale, offset), _mm512_fmadd_ps(second, scale, offset)};
  }

  static __m512 value(__m512i packed, int index) {
    if (BITS == 4) {
      const __m512 table =
          _mm512_set_ps(7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7, -8);
      return _mm512_permutexvar_ps(_mm512_srli_epi32(packed, 4 * index), table);
    }
    return _mm512_cvtepi32_ps(
        _mm512_srai_epi32(_mm512_slli_epi32(packed, 24 - 8 * index), 24));
  }
};

}  // namespace
}  // namespace MOE_PRUNE_ISA
}  // namespace moe_prune

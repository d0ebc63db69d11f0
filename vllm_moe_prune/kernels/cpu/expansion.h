// 32 stored values of a step put where VDPBF16PS and AMX tiles want them, as bf16.
// Needs AVX-512 with VBMI2 and BF16; files that include it are compiled for that.

#pragma once

#include <immintrin.h>

#include "moe.h"

namespace moe_prune {
namespace {

// Ahead of the values being expanded; the hardware prefetcher stops at every page.
constexpr int AHEAD = 1024;

struct Plain {
  using Bits = uint16_t;

  static const float* after(const float* none, int64_t) { return none; }

  static __m512i expanded(uint32_t mask, const Bits* values, const float*) {
    return _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(values));
  }
};

// e4m3 times the scale of these inputs, rounded to bf16 as dense FP8 kernels do.
struct Scaled {
  using Bits = uint8_t;

  static const float* after(const float* scales, int64_t steps) {
    return scales + steps / (STEP / 2);
  }

  static __m512i expanded(uint32_t mask, const Bits* values, const float* scale) {
    __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
    __m512i wide = _mm512_cvtepu8_epi16(_mm256_maskz_expand_epi8(mask, packed));
    __m512i size = _mm512_and_si512(wide, _mm512_set1_epi16(0x7f));
    __m512i sign = _mm512_slli_epi16(_mm512_andnot_si512(size, wide), 8);
    // Exponent and mantissa as bf16. Denormals get the exponent of the smallest normal,
    // whose leading one is subtracted again: so no denormal is ever computed with.
    __mmask32 denormal = _mm512_cmplt_epu16_mask(size, _mm512_set1_epi16(8));
    __mmask32 nan = _mm512_cmpeq_epu16_mask(size, _mm512_set1_epi16(0x7f));
    __m512i moved = _mm512_slli_epi16(size, 4);
    __m512i bits = _mm512_add_epi16(moved, _mm512_set1_epi16(120 << 7));
    bits = _mm512_mask_add_epi16(bits, denormal, moved, _mm512_set1_epi16(121 << 7));
    __m512 factor = _mm512_set1_ps(*scale), one = _mm512_set1_ps(0x1p-6f);
    __m512 low = as_floats(_mm512_castsi512_si256(bits));
    __m512 high = as_floats(_mm512_extracti64x4_epi64(bits, 1));
    low = _mm512_mask_sub_ps(low, static_cast<__mmask16>(denormal), low, one);
    high = _mm512_mask_sub_ps(high, static_cast<__mmask16>(denormal >> 16), high, one);
    low = _mm512_mul_ps(low, factor);
    high = _mm512_mul_ps(high, factor);
    __m512i found = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    found = _mm512_mask_mov_epi16(found, nan, _mm512_set1_epi16(0x7fc0));
    return _mm512_xor_si512(found, sign);
  }

  static __m512 as_floats(__m256i bf16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16));
  }
};

// Where the next step of a block is. V says what values are.
template <class V>
struct Cursor {
  const uint32_t* masks;
  const typename V::Bits* values;
  const float* scales;

  explicit Cursor(const Stream& from)
      : masks(from.masks),
        values(static_cast<const typename V::Bits*>(from.values)),
        scales(from.scales) {}
  Cursor() = default;

  void prefetch() const {
    _mm_prefetch(reinterpret_cast<const char*>(values) + AHEAD, _MM_HINT_T0);
  }

  // Step `index` from masks and scales, which stay; values go on.
  __m512i expanded(int64_t index) {
    uint32_t mask = masks[index];
    __m512i found = V::expanded(mask, values, V::after(scales, index));
    values += __builtin_popcount(mask);
    return found;
  }
};

}  // namespace
}  // namespace moe_prune

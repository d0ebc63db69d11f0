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

// e4m3 times the scale of these inputs, rounded to bf16 as dense FP8 kernels do. With the
// bits of e4m3 in the upper byte, a shift by one makes it a half-precision number 2^-8 as
// large, denormals too.
struct Scaled {
  using Bits = uint8_t;

  static const float* after(const float* scales, int64_t steps) {
    return scales + steps / (STEP / 2);
  }

  static __m512i expanded(uint32_t mask, const Bits* values, const float* scale) {
    __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
    __m512i words = _mm512_slli_epi16(
        _mm512_cvtepu8_epi16(_mm256_maskz_expand_epi8(mask, packed)), 8);
    const __m512i all = _mm512_set1_epi16(0x7f00);
    __mmask32 nan = _mm512_cmpeq_epi16_mask(_mm512_and_si512(words, all), all);
    __m512i half = _mm512_and_si512(_mm512_srai_epi16(words, 1),
                                    _mm512_set1_epi16(static_cast<short>(0xbf80)));
    half = _mm512_mask_mov_epi16(half, nan, _mm512_set1_epi16(0x7e00));
    const __m512 factor = _mm512_set1_ps(*scale * 0x1p8f);
    __m512 low = _mm512_cvtph_ps(_mm512_castsi512_si256(half));
    __m512 high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1));
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(factor, high),
                                        _mm512_mul_ps(factor, low));
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

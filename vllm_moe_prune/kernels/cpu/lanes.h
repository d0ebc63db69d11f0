// The 16 outputs of a block in registers: one of 512 bits, or two of 256. Compiled for
// AVX-512 with VNNI, for AVX2 with AVX-VNNI, and for AVX2 alone.

#pragma once

#include <immintrin.h>

#include <cstdint>

#include "moe.h"

namespace moe_prune {
namespace MOE_PRUNE_ISA {
namespace {

#ifdef __AVX512VNNI__

using Ints = __m512i;
using Floats = __m512;

inline Ints words(const void* at) { return _mm512_loadu_si512(at); }
inline Ints all(int32_t value) { return _mm512_set1_epi32(value); }
inline Ints both(Ints a, Ints b) { return _mm512_and_si512(a, b); }
inline Ints either(Ints a, Ints b) { return _mm512_xor_si512(a, b); }
inline Ints moved_by_4(Ints a) { return _mm512_srli_epi32(a, 4); }
inline Ints larger(Ints a, Ints b) { return _mm512_max_epi32(a, b); }
inline int32_t largest(Ints a) { return _mm512_reduce_max_epi32(a); }
inline int32_t total(Ints a) { return _mm512_reduce_add_epi32(a); }
inline Ints plus(Ints a, Ints b) { return _mm512_add_epi32(a, b); }

// Of four unsigned bytes and four signed ones in each lane, added to it.
template <int BITS>
inline Ints dot(Ints sum, Ints weights, Ints inputs) {
  return _mm512_dpbusd_epi32(sum, weights, inputs);
}

inline Floats all(float value) { return _mm512_set1_ps(value); }
inline Floats floats(Ints a) { return _mm512_cvtepi32_ps(a); }
inline Ints nearest(Floats a) { return _mm512_cvtps_epi32(a); }
inline Ints bits_of(Floats a) { return _mm512_castps_si512(a); }
inline Floats times(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats times_plus(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats minus_times(Floats a, Floats b, Floats c) {
  return _mm512_fnmadd_ps(a, b, c);
}
inline void store(float* at, Floats a) { _mm512_storeu_ps(at, a); }
inline __m128i bytes(Ints a) { return _mm512_cvtepi32_epi8(a); }

inline Floats load_f32(const void* at) { return _mm512_loadu_ps(at); }
inline Floats load_bf16(const void* at) {
  const __m256i half = _mm256_loadu_si256(static_cast<const __m256i*>(at));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline Floats load_f16(const void* at) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(at)));
}
inline Floats load_i8(const int8_t* at) {
  return floats(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))));
}

#else

struct Ints {
  __m256i a, b;
};
struct Floats {
  __m256 a, b;
};

inline Ints words(const void* at) {
  auto from = static_cast<const __m256i*>(at);
  return {_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)};
}
inline Ints all(int32_t value) {
  const __m256i one = _mm256_set1_epi32(value);
  return {one, one};
}
inline Ints both(Ints x, Ints y) {
  return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)};
}
inline Ints either(Ints x, Ints y) {
  return {_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)};
}
inline Ints moved_by_4(Ints x) {
  return {_mm256_srli_epi32(x.a, 4), _mm256_srli_epi32(x.b, 4)};
}
inline Ints larger(Ints x, Ints y) {
  return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)};
}
inline Ints plus(Ints x, Ints y) {
  return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)};
}
inline int32_t largest(Ints x) {
  __m256i eight = _mm256_max_epi32(x.a, x.b);
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight),
                               _mm256_extracti128_si256(eight, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
inline int32_t total(Ints x) {
  __m256i eight = _mm256_add_epi32(x.a, x.b);
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight),
                               _mm256_extracti128_si256(eight, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}

template <int BITS>
inline __m256i dot_of_8(__m256i sum, __m256i weights, __m256i inputs) {
#ifdef __AVXVNNI__
  return _mm256_dpbusd_avx_epi32(sum, weights, inputs);
#else
  if (BITS == 4) {  // two products of 15 and 127 fit into 16 bits
    const __m256i pairs = _mm256_maddubs_epi16(weights, inputs);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  const __m256i even = _mm256_and_si256(weights, _mm256_set1_epi16(0xff));
  const __m256i odd = _mm256_srli_epi16(weights, 8);
  const __m256i even_x = _mm256_srai_epi16(_mm256_slli_epi16(inputs, 8), 8);
  const __m256i odd_x = _mm256_srai_epi16(inputs, 8);
  return _mm256_add_epi32(sum, _mm256_add_epi32(_mm256_madd_epi16(even, even_x),
                                                _mm256_madd_epi16(odd, odd_x)));
#endif
}

template <int BITS>
inline Ints dot(Ints sum, Ints weights, Ints inputs) {
  return {dot_of_8<BITS>(sum.a, weights.a, inputs.a),
          dot_of_8<BITS>(sum.b, weights.b, inputs.b)};
}

inline Floats all(float value) {
  const __m256 one = _mm256_set1_ps(value);
  return {one, one};
}
inline Floats floats(Ints x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline Ints nearest(Floats x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
inline Ints bits_of(Floats x) {
  return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)};
}
inline Floats times(Floats x, Floats y) {
  return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)};
}
inline Floats times_plus(Floats x, Floats y, Floats z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline Floats minus_times(Floats x, Floats y, Floats z) {
  return {_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)};
}
inline void store(float* at, Floats x) {
  _mm256_storeu_ps(at, x.a);
  _mm256_storeu_ps(at + 8, x.b);
}
inline __m128i bytes(Ints x) {
  // Packing works in halves of 128 bits; the second and third quarters change places.
  const __m256i pairs = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
  return _mm_packs_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
}

inline Floats load_f32(const void* at) {
  auto from = static_cast<const float*>(at);
  return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)};
}
inline __m256 eight_of_bf16(const __m128i* at) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(at)), 16));
}
inline Floats load_bf16(const void* at) {
  auto from = static_cast<const __m128i*>(at);
  return {eight_of_bf16(from), eight_of_bf16(from + 1)};
}
inline Floats load_f16(const void* at) {
  auto from = static_cast<const __m128i*>(at);
  return {_mm256_cvtph_ps(_mm_loadu_si128(from)),
          _mm256_cvtph_ps(_mm_loadu_si128(from + 1))};
}
inline Floats load_i8(const int8_t* at) {
  const __m128i found = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
  return floats({_mm256_cvtepi8_epi32(found),
                 _mm256_cvtepi8_epi32(_mm_srli_si128(found, 8))});
}

#endif

// 16 numbers of a Type.
inline Floats load(const void* at, int32_t type) {
  switch (type) {
    case AS_BF16: return load_bf16(at);
    case AS_F16: return load_f16(at);
    default: return load_f32(at);
  }
}

}  // namespace
}  // namespace MOE_PRUNE_ISA
}  // namespace moe_prune

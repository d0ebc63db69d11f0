// What encode.cpp does, for 16-bit values by AVX-512 with VBMI2.

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "moe.h"

namespace moe_prune {
namespace vbmi2 {

int64_t encode_piece(const uint16_t piece[BLOCK][PIECE], int64_t steps, uint32_t* masks,
                     uint16_t* values) {
  const __m512i first = _mm512_mullo_epi32(
      _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
      _mm512_set1_epi32(PIECE / 2));
  int64_t count = 0;
  for (int64_t step = 0; step < steps; ++step) {
    const __m512i both = _mm512_i32gather_epi32(
        first, reinterpret_cast<const int*>(&piece[0][2 * step]), 4);
    const __mmask32 mask = _mm512_test_epi16_mask(both, both);
    _mm512_storeu_si512(values + count, _mm512_maskz_compress_epi16(mask, both));
    masks[step] = mask;
    count += __builtin_popcount(mask);
  }
  return count;
}

void unpack_row(const uint8_t* bits, const uint16_t* values, int64_t cols, uint16_t* out) {
  for (int64_t col = 0; col < cols; col += 32) {
    const int64_t held = std::min<int64_t>(32, cols - col);
    uint32_t mask = 0;
    std::memcpy(&mask, bits + col / 8, held / 8);
    const int count = __builtin_popcount(mask);
    // No further than the values go: they may end with the memory.
    const __mmask32 stored = count == 32 ? ~0u : (1u << count) - 1;
    const __m512i dense =
        _mm512_maskz_expand_epi16(mask, _mm512_maskz_loadu_epi16(stored, values));
    _mm512_mask_storeu_epi16(out + col, held == 32 ? ~0u : (1u << held) - 1, dense);
    values += count;
  }
}

}  // namespace vbmi2
}  // namespace moe_prune

// Tokens rounded to int8 times weights of integers, by dot products of bytes: sums of
// STEP inputs are exact, and only then multiplied by the step of the token and by the
// scale of the weights. Compiled once per instruction set, each time into a namespace of
// its own (MOE_PRUNE_ISA).
//
// Four bits need one shift and two masks for 128 weights: the low halves of a word's bytes
// are inputs 0, 2, 4 and 6 of its eight, the high ones 1, 3, 5 and 7, and tokens are kept
// in that order. Bytes of weights are unsigned, counted from the lowest value; what that
// adds to a sum is a property of the token, and where the sum starts.

#include <cmath>
#include <cstring>

#include "lanes.h"
#include "moe.h"

namespace moe_prune {
namespace MOE_PRUNE_ISA {
namespace {

#ifdef __AVX512VNNI__
constexpr int HELD = 12;  // rows whose sums fit into registers, with two blocks
#else
constexpr int HELD = 2;
#endif
constexpr int64_t AHEAD = 2048;  // bytes, of values

template <int BITS>
constexpr int32_t LOWEST = -(1 << (BITS - 1));

template <int BITS>
inline __m128i in_order(__m128i sixteen) {
  if (BITS == 8) return sixteen;
  return _mm_shuffle_epi8(
      sixteen, _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
}

template <int BITS>
void round_columns(const void* x, int32_t type, int64_t held, int64_t k, int64_t from,
                   int64_t to, char* row) {
  const int64_t size = type == AS_F32 ? 4 : 2;
  const Rounded target(row, k);
  for (int64_t column = from; column < to; column += STEP) {
    const char* source = static_cast<const char*>(x) + column * size;
    char padded[STEP * 4] = {};
    if (held - column < STEP) {
      if (held > column) std::memcpy(padded, source, (held - column) * size);
      source = padded;
    }
    const Floats a = load(source, type), b = load(source + STEP / 2 * size, type);
    const Ints magnitude = all(0x7fffffff);
    // As integers: NaN is larger than infinity, which is larger than any number.
    const int32_t bits =
        largest(larger(both(bits_of(a), magnitude), both(bits_of(b), magnitude)));
    float most, scale = 0, step = 0;
    std::memcpy(&most, &bits, sizeof most);
    if (!(most <= LARGEST)) {
      step = NAN;  // and so all outputs
    } else if (most >= SMALLEST) {
      scale = 127.0f / most;
      step = most / 127.0f;
    }
    Ints qa = all(0), qb = all(0);
    if (step > 0) {
      qa = nearest(times(a, all(scale)));
      qb = nearest(times(b, all(scale)));
    }
    auto out = reinterpret_cast<__m128i*>(target.values + column);
    _mm_storeu_si128(out, in_order<BITS>(bytes(qa)));
    _mm_storeu_si128(out + 1, in_order<BITS>(bytes(qb)));
    target.steps[column / STEP] = step;
    target.starts[column / STEP] = LOWEST<BITS> * total(plus(qa, qb));
  }
}

inline Ints inputs_at(const int8_t* four) {
  int32_t word;
  std::memcpy(&word, four, sizeof word);
  return all(word);
}

// M rows, y[M][WIDTH].
template <int BITS, int M>
void rows(const Stream pair[2], const char* x, int64_t stride, int64_t k, float* y) {
  constexpr int VECTORS = STEP * BITS / 32;  // of a block, for STEP inputs
  const char* values[2] = {static_cast<const char*>(pair[0].values),
                           static_cast<const char*>(pair[1].values)};
  const int64_t size = pair[0].factor_type == AS_F32 ? 4 : 2, group = pair[0].group;
  // Behind a block is the other one of its pair; the next pair follows that.
  const int64_t bytes = k * BLOCK * BITS / 8;
  const char* ends[2] = {values[0] + bytes, values[1] + bytes};
  Floats sum[2][M];
  for (auto& block : sum)
    for (auto& row : block) row = all(0.0f);
  for (int64_t k0 = 0, index = 0; k0 < k; k0 += group, ++index) {
    Floats part[2][M];
    for (int64_t i = k0; i < k0 + group; i += STEP) {
      Ints found[2][M];
      const int8_t* inputs[M];
      for (int row = 0; row < M; ++row) {
        const Rounded token(x + row * stride, k);
        inputs[row] = token.values + i;
        found[0][row] = found[1][row] = all(token.starts[i / STEP]);
      }
      const char* next[2];
      for (int b = 0; b < 2; ++b) {
        next[b] = values[b] + AHEAD;
        if (next[b] >= ends[b]) next[b] += bytes;
      }
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) {
        Ints packed[2];
        for (int b = 0; b < 2; ++b) {
          packed[b] = words(values[b]);
          _mm_prefetch(next[b] + v * 4 * BLOCK, _MM_HINT_T0);
          values[b] += 4 * BLOCK;
        }
        if (BITS == 4) {
          const Ints mask = all(0x0f0f0f0f);
          const Ints low[2] = {both(packed[0], mask), both(packed[1], mask)};
          const Ints high[2] = {both(moved_by_4(packed[0]), mask),
                                both(moved_by_4(packed[1]), mask)};
          for (int row = 0; row < M; ++row) {
            const Ints first = inputs_at(inputs[row] + 8 * v);
            const Ints second = inputs_at(inputs[row] + 8 * v + 4);
            for (int b = 0; b < 2; ++b) found[b][row] = dot<4>(found[b][row], low[b], first);
            for (int b = 0; b < 2; ++b)
              found[b][row] = dot<4>(found[b][row], high[b], second);
          }
        } else {
          const Ints flip = all(static_cast<int32_t>(0x80808080));
          for (int b = 0; b < 2; ++b) packed[b] = either(packed[b], flip);
          for (int row = 0; row < M; ++row) {
            const Ints four = inputs_at(inputs[row] + 4 * v);
            for (int b = 0; b < 2; ++b) found[b][row] = dot<8>(found[b][row], packed[b], four);
          }
        }
      }
      for (int row = 0; row < M; ++row) {
        const Floats step = all(Rounded(x + row * stride, k).steps[i / STEP]);
        for (int b = 0; b < 2; ++b)
          part[b][row] = i == k0 ? times(floats(found[b][row]), step)
                                 : times_plus(floats(found[b][row]), step, part[b][row]);
      }
    }
    for (int b = 0; b < 2; ++b) {
      const char* factors = static_cast<const char*>(pair[b].factors);
      const Floats scale =
          load(factors + index * BLOCK * size, pair[b].factor_type);
      if (pair[b].zeros) {
        const Floats zero = load_i8(pair[b].zeros + index * BLOCK);
        for (int row = 0; row < M; ++row) {
          const Rounded token(x + row * stride, k);
          float inputs = 0;
          for (int64_t i = k0 / STEP; i < (k0 + group) / STEP; ++i)
            inputs = std::fma(static_cast<float>(token.starts[i]) / LOWEST<BITS>,
                              token.steps[i], inputs);
          part[b][row] = minus_times(zero, all(inputs), part[b][row]);
        }
      }
      for (int row = 0; row < M; ++row)
        sum[b][row] = times_plus(part[b][row], scale, sum[b][row]);
    }
  }
  for (int row = 0; row < M; ++row)
    for (int b = 0; b < 2; ++b) store(y + row * WIDTH + b * BLOCK, sum[b][row]);
}

template <int BITS, int M>
void up_to(int64_t m, const Stream pair[2], const char* x, int64_t stride, int64_t k,
           float* y) {
  if constexpr (M > 1)
    if (m < M) return up_to<BITS, M - 1>(m, pair, x, stride, k, y);
  rows<BITS, M>(pair, x, stride, k, y);
}

// Packed weights of a pair stay in the second-level cache for all rows.
template <int BITS>
void all_rows(const Stream pair[2], const void* x_bytes, int64_t stride, int64_t m,
              int64_t k, float* y) {
  auto x = static_cast<const char*>(x_bytes);
  // As even as possible: a last group of one row would use the weights badly.
  const int64_t groups = (m + HELD - 1) / HELD;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t row = group * m / groups, end = (group + 1) * m / groups;
    up_to<BITS, HELD>(end - row, pair, x + row * stride, stride, k, y + row * WIDTH);
  }
}

}  // namespace

void round_i4(const void* x, int32_t type, int64_t held, int64_t k, int64_t from,
              int64_t to, char* row) {
  round_columns<4>(x, type, held, k, from, to, row);
}

void round_i8(const void* x, int32_t type, int64_t held, int64_t k, int64_t from,
              int64_t to, char* row) {
  round_columns<8>(x, type, held, k, from, to, row);
}

void dots_i4(const Stream pair[2], const void* x, int64_t stride, int64_t m, int64_t k,
             float* y) {
  all_rows<4>(pair, x, stride, m, k, y);
}

void dots_i8(const Stream pair[2], const void* x, int64_t stride, int64_t m, int64_t k,
             float* y) {
  all_rows<8>(pair, x, stride, m, k, y);
}

}  // namespace MOE_PRUNE_ISA
}  // namespace moe_prune

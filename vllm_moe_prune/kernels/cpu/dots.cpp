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
constexpr int64_t SCALES_AHEAD = 512;

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

// The sum of a token's inputs from and to, as they were rounded.
template <int BITS>
__attribute__((noinline)) float sum_of(const Rounded& token, int64_t from, int64_t to) {
  float sum = 0;
  for (int64_t i = from / STEP; i < to / STEP; ++i)
    sum = std::fma(static_cast<float>(token.starts[i]) / LOWEST<BITS>, token.steps[i], sum);
  return sum;
}

// Where a block is read.
struct Source {
  const char *values, *values_end, *factors, *factors_end;
  const int8_t* zeros;
  int64_t bytes, factor_bytes;

  // Behind a block is the other one of its pair; the next pair follows that.
  const char* ahead_of_values() const {
    const char* next = values + AHEAD;
    return next < values_end ? next : next + bytes;
  }
  const char* ahead_of_factors() const {
    const char* next = factors + SCALES_AHEAD;
    return next < factors_end ? next : next + factor_bytes;
  }
};

// M rows, y[M][WIDTH]. Loops are unrolled so that sums are in registers.
template <int BITS, int M>
void rows(const Stream pair[2], const char* x, int64_t stride, int64_t k, float* y) {
  constexpr int VECTORS = STEP * BITS / 32;  // of a block, for STEP inputs
  const int32_t type = pair[0].factor_type;
  const int64_t size = type == AS_F32 ? 4 : 2, group = pair[0].group;
  const int64_t bytes = k * BLOCK * BITS / 8, factor_bytes = k / group * BLOCK * size;
  Source at[2];
  for (int b = 0; b < 2; ++b) {
    auto values = static_cast<const char*>(pair[b].values);
    auto factors = static_cast<const char*>(pair[b].factors);
    at[b] = {values,        values + bytes, factors,     factors + factor_bytes,
             pair[b].zeros, bytes,          factor_bytes};
  }
  Floats sum[2][M], part[2][M];
#pragma GCC unroll 12
  for (int row = 0; row < M; ++row) {
    sum[0][row] = sum[1][row] = all(0.0f);
    part[0][row] = part[1][row] = all(0.0f);
  }
  for (int64_t k0 = 0; k0 < k; k0 += group) {
    for (int64_t i = k0; i < k0 + group; i += STEP) {
      Ints found[2][M];
      const int8_t* inputs[M];
#pragma GCC unroll 12
      for (int row = 0; row < M; ++row) {
        const Rounded token(x + row * stride, k);
        inputs[row] = token.values + i;
        found[0][row] = found[1][row] = all(token.starts[i / STEP]);
      }
      const char* next[2] = {at[0].ahead_of_values(), at[1].ahead_of_values()};
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) {
        Ints packed[2];
#pragma GCC unroll 2
        for (int b = 0; b < 2; ++b) {
          packed[b] = words(at[b].values);
          _mm_prefetch(next[b] + v * 4 * BLOCK, _MM_HINT_T0);
          at[b].values += 4 * BLOCK;
        }
        if constexpr (BITS == 4) {
          const Ints mask = all(0x0f0f0f0f);
          const Ints low[2] = {both(packed[0], mask), both(packed[1], mask)};
          const Ints high[2] = {both(moved_by_4(packed[0]), mask),
                                both(moved_by_4(packed[1]), mask)};
#pragma GCC unroll 12
          for (int row = 0; row < M; ++row) {
            const Ints first = inputs_at(inputs[row] + 8 * v);
            const Ints second = inputs_at(inputs[row] + 8 * v + 4);
            found[0][row] = dot<4>(found[0][row], low[0], first);
            found[1][row] = dot<4>(found[1][row], low[1], first);
            found[0][row] = dot<4>(found[0][row], high[0], second);
            found[1][row] = dot<4>(found[1][row], high[1], second);
          }
        } else {
          const Ints flip = all(static_cast<int32_t>(0x80808080));
          packed[0] = either(packed[0], flip);
          packed[1] = either(packed[1], flip);
#pragma GCC unroll 12
          for (int row = 0; row < M; ++row) {
            const Ints four = inputs_at(inputs[row] + 4 * v);
            found[0][row] = dot<8>(found[0][row], packed[0], four);
            found[1][row] = dot<8>(found[1][row], packed[1], four);
          }
        }
      }
#pragma GCC unroll 12
      for (int row = 0; row < M; ++row) {
        const Floats step = all(Rounded(x + row * stride, k).steps[i / STEP]);
#pragma GCC unroll 2
        for (int b = 0; b < 2; ++b)
          part[b][row] = i == k0 ? times(floats(found[b][row]), step)
                                 : times_plus(floats(found[b][row]), step, part[b][row]);
      }
    }
#pragma GCC unroll 2
    for (int b = 0; b < 2; ++b) {
      _mm_prefetch(at[b].ahead_of_factors(), _MM_HINT_T0);
      const Floats scale = load(at[b].factors, type);
      at[b].factors += BLOCK * size;
      if (at[b].zeros) {
        const Floats zero = load_i8(at[b].zeros);
        at[b].zeros += BLOCK;
#pragma GCC unroll 12
        for (int row = 0; row < M; ++row) {
          const float inputs = sum_of<BITS>({x + row * stride, k}, k0, k0 + group);
          part[b][row] = minus_times(zero, all(inputs), part[b][row]);
        }
      }
#pragma GCC unroll 12
      for (int row = 0; row < M; ++row)
        sum[b][row] = times_plus(part[b][row], scale, sum[b][row]);
    }
  }
#pragma GCC unroll 12
  for (int row = 0; row < M; ++row) {
    store(y + row * WIDTH, sum[0][row]);
    store(y + row * WIDTH + BLOCK, sum[1][row]);
  }
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

// Fused sparse mixture-of-experts on CPUs: what the files of this folder share.
//
// A weight matrix of N outputs and K inputs is stored in blocks of 16 outputs, two
// blocks ("a pair") always together: gate and up of the same outputs, or two blocks of
// down. Within a block, step k holds the inputs 2k and 2k + 1 of all 16 outputs: one
// 32-bit mask whose bit 2 n + i says whether input 2k + i of output n is stored, and the
// stored values in the order of the bits. That is the order in which both VDPBF16PS and
// an AMX tile want dense weights. K is padded to a multiple of 32, N to one of 32.

#pragma once

#include <cfloat>
#include <cstdint>

namespace moe_prune {

constexpr int BLOCK = 16;  // outputs of a block
constexpr int WIDTH = 32;  // outputs of a pair
constexpr int STEP = 32;   // inputs are padded to a multiple of this
constexpr int ROWS = 16;   // tokens of a tile
constexpr int PIECE = 64;  // inputs of a block that are encoded at a time, at most
constexpr int TAIL = 64;   // values behind the last one: read, but never used
constexpr int GROUP = 8;   // pairs that are multiplied one after the other, at most

inline int64_t round_up(int64_t value, int64_t step) {
  return (value + step - 1) / step * step;
}

// What a processor has, each with all before it.
enum Level : int32_t { PORTABLE, AVX2, AVX512, VBMI2, BF16, AMX };

// Of tokens; weights are of the same type, or of e4m3 with scales.
enum Type : int32_t { AS_BF16 = 0, AS_F16 = 1, AS_F32 = 2 };

// How weights are stored: as the type of tokens, or as one of these, with scales.
enum Storage : int32_t { AS_TOKENS = 0, E4M3 = 1, INT8 = 2, INT4 = 3 };

// Which dot products of bytes multiply integers by tokens rounded to int8; bits of
// moe_prune_dots().
enum Dots : int32_t { NO_DOTS = 0, DOTS_AVX2 = 1, DOTS_AVXVNNI = 2, DOTS_AVX512VNNI = 4 };

// One block, at its first value. Integers have no masks: all of them are stored; a weight
// is one minus a zero point, times a scale, [K / group][BLOCK].
struct Stream {
  const uint32_t* masks;
  const void* values;
  const float* scales;   // of e4m3: one for each STEP inputs
  const void* factors;   // of integers: their scales
  int32_t factor_type;   // a Type
  const int8_t* zeros;   // null: all are 0
  int64_t group;         // inputs that share a scale
};

// A token rounded to int8: of each STEP inputs the largest is 127 steps. Groups that are
// smaller than SMALLEST are 0; a group that is not finite makes all outputs NaN.
struct Rounded {
  int8_t* values;   // [k], in the order that the weights want
  float* steps;     // [k / STEP]
  int32_t* starts;  // [k / STEP]: the lowest weight times the sum of the values

  Rounded(char* row, int64_t k)
      : values(reinterpret_cast<int8_t*>(row)),
        steps(reinterpret_cast<float*>(row + k)),
        starts(reinterpret_cast<int32_t*>(row + k + k / STEP * 4)) {}
  Rounded(const char* row, int64_t k) : Rounded(const_cast<char*>(row), k) {}

  // Bytes of a row. A power of two apart they would share too few lines of the cache.
  static int64_t stride(int64_t k) { return round_up(k + k / STEP * 8, 128) + 64; }
};

constexpr float SMALLEST = 0x1p-100f, LARGEST = FLT_MAX;

// y[m][WIDTH] = x[m][k] times the two blocks, in fp32; rows of x are x_stride elements
// apart. pair_amx takes x in tiles instead, [m / ROWS][k / STEP][ROWS][STEP], rounds m up
// to whole tiles, and takes up to two of them.
using PairKernel = void (*)(const Stream pair[2], const void* x, int64_t x_stride,
                            int64_t m, int64_t k, float* y);

// Columns from and to, multiples of STEP, of a token of a Type into row, a Rounded; from
// `held` on they are 0.
using RoundKernel = void (*)(const void* x, int32_t type, int64_t held, int64_t k,
                             int64_t from, int64_t to, char* row);

// h[m][BLOCK] = silu(gate) * up, rounded to the type of h, from y[m][gate | up].
using ActivationKernel = void (*)(const float* y, int64_t m, void* h, int64_t h_stride);

#define MOE_PRUNE_PAIRS_OF(isa)                                                        \
  namespace isa {                                                                      \
  void pair_bf16(const Stream[2], const void*, int64_t, int64_t, int64_t, float*);     \
  void pair_f16(const Stream[2], const void*, int64_t, int64_t, int64_t, float*);      \
  void pair_f32(const Stream[2], const void*, int64_t, int64_t, int64_t, float*);      \
  void pair_f8_bf16(const Stream[2], const void*, int64_t, int64_t, int64_t, float*);  \
  void pair_f8_f16(const Stream[2], const void*, int64_t, int64_t, int64_t, float*);   \
  void pair_f8_f32(const Stream[2], const void*, int64_t, int64_t, int64_t, float*);   \
  }

// For the files that define them from pair<type of tokens, type of weights>.
#define MOE_PRUNE_PAIRS(T, name)                                                       \
  void pair_##name(const Stream blocks[2], const void* x, int64_t stride, int64_t m,   \
                   int64_t k, float* y) {                                              \
    pair<T, T>(blocks, x, stride, m, k, y);                                            \
  }                                                                                    \
  void pair_f8_##name(const Stream blocks[2], const void* x, int64_t stride,           \
                      int64_t m, int64_t k, float* y) {                                \
    pair<T, F8>(blocks, x, stride, m, k, y);                                           \
  }

#define MOE_PRUNE_INT_PAIRS_OF(isa)                                                    \
  namespace isa {                                                                      \
  void pair_i8_bf16(const Stream[2], const void*, int64_t, int64_t, int64_t, float*);  \
  void pair_i8_f16(const Stream[2], const void*, int64_t, int64_t, int64_t, float*);   \
  void pair_i8_f32(const Stream[2], const void*, int64_t, int64_t, int64_t, float*);   \
  void pair_i4_bf16(const Stream[2], const void*, int64_t, int64_t, int64_t, float*);  \
  void pair_i4_f16(const Stream[2], const void*, int64_t, int64_t, int64_t, float*);   \
  void pair_i4_f32(const Stream[2], const void*, int64_t, int64_t, int64_t, float*);   \
  }

#define MOE_PRUNE_INT_PAIRS(T, name)                                                   \
  void pair_i8_##name(const Stream blocks[2], const void* x, int64_t stride,           \
                      int64_t m, int64_t k, float* y) {                                \
    pair<T, Int<8>>(blocks, x, stride, m, k, y);                                       \
  }                                                                                    \
  void pair_i4_##name(const Stream blocks[2], const void* x, int64_t stride,           \
                      int64_t m, int64_t k, float* y) {                                \
    pair<T, Int<4>>(blocks, x, stride, m, k, y);                                       \
  }

// A PairKernel of rounded tokens, whose stride is in bytes, wants groups that are
// multiples of STEP.
#define MOE_PRUNE_DOTS_OF(isa)                                                         \
  namespace isa {                                                                      \
  void round_i4(const void*, int32_t, int64_t, int64_t, int64_t, int64_t, char*);      \
  void round_i8(const void*, int32_t, int64_t, int64_t, int64_t, int64_t, char*);      \
  void dots_i4(const Stream[2], const void*, int64_t, int64_t, int64_t, float*);       \
  void dots_i8(const Stream[2], const void*, int64_t, int64_t, int64_t, float*);       \
  }

#define MOE_PRUNE_ACTIVATIONS_OF(isa)                                                  \
  namespace isa {                                                                      \
  void activate_bf16(const float*, int64_t, void*, int64_t);                           \
  void activate_f16(const float*, int64_t, void*, int64_t);                            \
  void activate_f32(const float*, int64_t, void*, int64_t);                            \
  }

MOE_PRUNE_PAIRS_OF(portable)
MOE_PRUNE_INT_PAIRS_OF(portable)
MOE_PRUNE_ACTIVATIONS_OF(portable)

// setup.py defines MOE_PRUNE_X86, MOE_PRUNE_BF16, MOE_PRUNE_AMX and MOE_PRUNE_AVXVNNI, each
// with all before it, as far as the compiler has the instructions for them.
#ifdef MOE_PRUNE_X86
MOE_PRUNE_PAIRS_OF(avx2)
MOE_PRUNE_PAIRS_OF(avx512)
MOE_PRUNE_PAIRS_OF(vbmi2)
MOE_PRUNE_INT_PAIRS_OF(avx2)
MOE_PRUNE_INT_PAIRS_OF(avx512)
MOE_PRUNE_DOTS_OF(avx2)
MOE_PRUNE_DOTS_OF(avx512vnni)
MOE_PRUNE_ACTIVATIONS_OF(avx2)
MOE_PRUNE_ACTIVATIONS_OF(avx512)

// Some steps of a block from dense rows; returns how many values they have. There must be
// room for 32 more.
namespace vbmi2 {
int64_t encode_piece(const uint16_t piece[BLOCK][PIECE], int64_t steps, uint32_t* masks,
                     uint16_t* values);
// One row of a stored matrix, dense; cols is a multiple of 8.
void unpack_row(const uint8_t* bits, const uint16_t* values, int64_t cols, uint16_t* out);
}  // namespace vbmi2

#ifdef MOE_PRUNE_BF16
// Of bf16, by its dot products: weights are expanded straight into the operand.
void pair_expand(const Stream[2], const void*, int64_t, int64_t, int64_t, float*);
void pair_expand_f8(const Stream[2], const void*, int64_t, int64_t, int64_t, float*);
#endif

#ifdef MOE_PRUNE_AMX
// Of bf16, by AMX tiles, weights stored in any way.
void pair_amx(const Stream[2], const void*, int64_t, int64_t, int64_t, float*);
void pair_amx_f8(const Stream[2], const void*, int64_t, int64_t, int64_t, float*);
void pair_amx_i8(const Stream[2], const void*, int64_t, int64_t, int64_t, float*);
void pair_amx_i4(const Stream[2], const void*, int64_t, int64_t, int64_t, float*);

// The same for more tokens than two tiles and up to GROUP pairs, y_pair floats apart.
using PairsKernel = void (*)(const Stream* blocks, int64_t pairs, const void* x_tiles,
                             int64_t m, int64_t k, float* y, int64_t y_pair);
void pairs_amx(const Stream*, int64_t, const void*, int64_t, int64_t, float*, int64_t);
void pairs_amx_f8(const Stream*, int64_t, const void*, int64_t, int64_t, float*, int64_t);
void pairs_amx_i8(const Stream*, int64_t, const void*, int64_t, int64_t, float*, int64_t);
void pairs_amx_i4(const Stream*, int64_t, const void*, int64_t, int64_t, float*, int64_t);
bool amx_allowed();  // asks Linux for the tiles; once is enough for a process
void amx_begin();    // in every thread, before pair_amx
void amx_end();      // in every thread, after it: the tiles are configured as before
#endif

#ifdef MOE_PRUNE_AVXVNNI
MOE_PRUNE_DOTS_OF(avxvnni)
#endif
#endif

}  // namespace moe_prune

extern "C" int32_t moe_prune_level();
extern "C" int32_t moe_prune_dots();

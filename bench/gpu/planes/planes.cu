// Few tokens times a matrix with zeros, from planes of bytes; a candidate for GPUs with fast memory.
//
// A warp owns a strip of 16 rows and a segment of the columns. A lane owns the weights that
// mma.m16n8k16 wants in its registers: 8 of every 16 columns, a byte of a mask. Its values stand
// in a column of their own in a table of 32: a row holds 4 values of each lane as 4 high and 4 low
// bytes. So loads from shared memory never collide, though lanes drift apart as their zeros
// differ, and funnel shifts and one byte permutation put two values in place. layout.py is the
// definition of what is read here.
#ifdef EMULATED
#define DEVICE static inline
#else
#include <cuda_runtime.h>
#include <stdint.h>
#define DEVICE static __device__ __forceinline__

DEVICE uint32_t permuted(uint32_t low, uint32_t high, uint32_t selectors) {
  uint32_t found;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(found) : "r"(low), "r"(high), "r"(selectors));
  return found;
}
DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], uint2 b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
}
DEVICE void copy16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(
                   (uint32_t)__cvta_generic_to_shared(to)),
               "l"(from)
               : "memory");
}
DEVICE void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT>
DEVICE void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}
#endif

#ifndef RING_ROWS
#define RING_ROWS 64
#endif
constexpr int WARPS = 8;         // of a block
constexpr int RING = RING_ROWS;  // rows of the table in shared memory, of each warp
constexpr int UNIT = 4;          // rows that are copied at a time
constexpr int AHEAD = 2;         // blocks of 64 columns that copies run ahead
constexpr int ROW = 256;         // bytes
// The first unit stands once more behind the last: a window of 3 rows never wraps.
constexpr int RING_BYTES = (RING + UNIT) * ROW;
constexpr int TABLE = 128;

// What of 4 values goes where for 4 bits of a mask, and what stays zero: selectors of two values
// in the low half, the bits themselves as signs of the high bytes.
DEVICE uint2 placing(uint32_t bits) {
  auto both = [](uint32_t first, uint32_t second) {
    return first | (4 + first) << 4 | second << 8 | (4 + second) << 12;
  };
  uint32_t b0 = bits & 1, b1 = bits >> 1 & 1, b2 = bits >> 2 & 1, b3 = bits >> 3;
  uint32_t second = b0 + b1, third = second + b2;
  return make_uint2(both(0, b0) | b0 << 23 | b1 << 31,
                    both(second & 3, third & 3) | b2 << 23 | b3 << 31);
}

DEVICE uint32_t pair(uint32_t low, uint32_t high, uint32_t how) {
  return permuted(low, high, how) & permuted(how, how, 0xBBAA);
}

// 16 columns. `bit` counts bits of one plane that this lane has used: row = bit / 32.
template <int TILES>
DEVICE void step(float (&sums)[TILES][4], uint32_t mask, int at, uint32_t& bit, const char* ring,
                 const char* table, const uint2* tokens) {
  const uint2* window = (const uint2*)(ring + ((bit & (RING - 1) * 32) << 3));
  uint2 w0 = window[0], w1 = window[ROW / 8], w2 = window[2 * ROW / 8];
  uint32_t high0 = __funnelshift_r(w0.x, w1.x, bit), high1 = __funnelshift_r(w1.x, w2.x, bit);
  uint32_t low0 = __funnelshift_r(w0.y, w1.y, bit), low1 = __funnelshift_r(w1.y, w2.y, bit);
  uint32_t first = __popc(mask & 0xFu << 8 * at) * 8;
  uint32_t high = __funnelshift_rc(high0, high1, first), low = __funnelshift_rc(low0, low1, first);
  uint32_t bits = mask >> 8 * at & 0xFF;
  uint2 one = ((const uint2*)table)[bits & 15], two = ((const uint2*)table)[bits >> 4];
  uint32_t a[4] = {pair(low0, high0, one.x), pair(low0, high0, one.y), pair(low, high, two.x),
                   pair(low, high, two.y)};
  bit += __popc(bits) * 8;
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) multiply(sums[tile], a, tokens[tile * 32]);
}

// firsts[task]: its first row among the values; until[task][blocks + 1]: rows that have been asked
// for when a block of columns begins; tokens: fragments; sums [strips * 16, TILES * 8].
template <int TILES>
DEVICE void product(const char* values, const uint32_t* masks, const uint32_t* firsts,
                    const uint16_t* until, const uint2* tokens, float* sums, int blocks,
                    int segments, int strips, char* shared) {
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int token_bytes = blocks * 4 * TILES * 256;
  char *table = shared, *held = shared + TABLE;
  char* ring = held + token_bytes + warp * RING_BYTES;
  int segment = blockIdx.y, strip = blockIdx.x * WARPS + warp;
  const char* given = (const char*)tokens + (size_t)segment * token_bytes;
  for (int i = threadIdx.x * 16; i < token_bytes; i += WARPS * 32 * 16) copy16(held + i, given + i);
  if (threadIdx.x < 16) ((uint2*)table)[threadIdx.x] = placing(threadIdx.x);
  bool spare = strip >= strips;  // takes part in barriers, and adds nothing
  if (spare) strip = strips - 1;
  size_t task = (size_t)strip * segments + segment;
  const char* from = values + (size_t)firsts[task] * ROW + lane * 16;
  const uint32_t* own_masks = masks + task * blocks * 32 + lane;
  const uint16_t* goals = until + task * (blocks + 1);
  uint32_t asked = 0;
  auto ask = [&](uint32_t goal) {
#pragma unroll 1
    for (; asked < goal; asked += UNIT, from += UNIT * ROW) {
      char* to = ring + (asked & (RING - 1)) * ROW + lane * 16;
      copy16(to, from);
      copy16(to + 512, from + 512);
      if (!(asked & (RING - 1))) {
        copy16(to + RING * ROW, from);
        copy16(to + RING * ROW + 512, from + 512);
      }
    }
    commit();
  };
  ask(goals[0]);
  float total[TILES][4] = {};
  uint32_t bit = 0, mask = own_masks[0];
  const char* column = ring + lane * 8;
  wait<0>();
  __syncthreads();
  const uint2* x = (const uint2*)held + lane;
#pragma unroll 1
  for (int block = 0; block < blocks; block++) {
    ask(goals[block + 1]);
    uint32_t next = own_masks[32 * min(block + 1, blocks - 1)];
    wait<AHEAD>();
    __syncwarp();  // other lanes' copies
#pragma unroll
    for (int at = 0; at < 4; at++)
      step<TILES>(total, mask, at, bit, column, table, x + at * TILES * 32);
    x += 4 * TILES * 32;
    mask = next;
    __syncwarp();  // nobody overwrites what another still reads
  }
  if (spare) return;
  for (int tile = 0; tile < TILES; tile++)
    for (int i = 0; i < 4; i++) {
      int row = lane / 4 + 8 * (i / 2), token = tile * 8 + lane % 4 * 2 + i % 2;
      float* place = sums + ((size_t)strip * 16 + row) * TILES * 8 + token;
      if (segments == 1)
        *place = total[tile][i];
      else
        atomicAdd(place, total[tile][i]);
    }
}

#ifndef EMULATED
extern __shared__ __align__(128) char dynamic[];
template <int TILES>
static __global__ void __launch_bounds__(WARPS * 32)
    kernel(const char* values, const uint32_t* masks, const uint32_t* firsts, const uint16_t* until,
           const uint2* tokens, float* sums, int blocks, int segments, int strips) {
  product<TILES>(values, masks, firsts, until, tokens, sums, blocks, segments, strips, dynamic);
}
template <int TILES>
static int start(const char* values, const uint32_t* masks, const uint32_t* firsts,
                 const uint16_t* until, const uint2* tokens, float* sums, int blocks, int segments,
                 int strips, cudaStream_t stream) {
  int bytes = TABLE + blocks * 4 * TILES * 256 + WARPS * RING_BYTES;
  cudaError_t error =
      cudaFuncSetAttribute(kernel<TILES>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  dim3 grid((strips + WARPS - 1) / WARPS, segments);
  kernel<TILES><<<grid, WARPS * 32, bytes, stream>>>(values, masks, firsts, until, tokens, sums,
                                                     blocks, segments, strips);
  return cudaGetLastError();
}
// An error of the CUDA runtime, 0 if there is none.
extern "C" int run(int tiles, const char* values, const uint32_t* masks, const uint32_t* firsts,
                   const uint16_t* until, const uint2* tokens, float* sums, int blocks,
                   int segments, int strips, void* stream) {
  auto* begin = tiles == 1 ? start<1> : start<2>;
  return begin(values, masks, firsts, until, tokens, sums, blocks, segments, strips,
               (cudaStream_t)stream);
}
#endif

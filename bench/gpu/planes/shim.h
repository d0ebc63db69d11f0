// Runs device code on a CPU: every thread of a block is a coroutine; barriers, mma and copies
// switch between them, in an order drawn from a seed. Copies end as late as they may, when they
// are waited for, or at once, as the seed says. It knows nothing of time, nor of memory that
// threads see in another order.
#pragma once
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

struct uint2 {
  uint32_t x, y;
};
static uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
struct Dim {
  unsigned x, y, z;
};
using std::min;

namespace shim {
struct Thread {
  ucontext_t context;
  std::vector<char> stack;
  Dim id;
  bool done;
};
struct Barrier {
  int arrived = 0;
  unsigned turn = 0;
};
struct Fragments {
  float* c[32];
  uint32_t a[32][4];
  uint2 b[32];
};
inline std::vector<Thread> threads;
inline ucontext_t main_context;
inline int now;
inline Dim block;
inline Barrier all;
inline std::vector<Barrier> warps;
inline std::vector<Fragments> fragments;
inline std::function<void()> body;
inline std::mt19937 random;
inline bool late;
inline int mistake = -1;  // which of those that a test has put in is made
using Copies = std::vector<std::function<void()>>;
inline std::vector<std::vector<Copies>> pending;  // of each thread, in groups

inline void yield() { swapcontext(&threads[now].context, &main_context); }
inline void meet(Barrier& barrier, int count) {
  unsigned turn = barrier.turn;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    barrier.turn++;
  } else {
    while (barrier.turn == turn) yield();
  }
}
inline void entry() {
  body();
  threads[now].done = true;
  yield();
}
inline void one_block(int count) {
  threads.assign(count, {});
  warps.assign(count / 32, {});
  fragments.assign(count / 32, {});
  pending.assign(count, {Copies()});
  all = {};
  for (int i = 0; i < count; i++) {
    auto& thread = threads[i];
    thread.stack.resize(64 << 10);
    thread.id = {(unsigned)i, 0, 0};
    getcontext(&thread.context);
    thread.context.uc_stack = {thread.stack.data(), 0, thread.stack.size()};
    makecontext(&thread.context, entry, 0);
  }
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  for (bool left = true; left;) {
    left = false;
    std::shuffle(order.begin(), order.end(), random);
    for (int i : order)
      if (!threads[i].done) {
        left = true;
        now = i;
        swapcontext(&main_context, &threads[i].context);
      }
  }
}
inline void launch(unsigned width, unsigned height, int count, unsigned seed,
                   std::function<void()> kernel) {
  body = kernel;
  random.seed(seed);
  late = seed % 2 == 0;
  for (block.y = 0; block.y < height; block.y++)
    for (block.x = 0; block.x < width; block.x++) one_block(count);
}
}  // namespace shim

#define MISTAKE(number) (shim::mistake == number)
#define threadIdx (shim::threads[shim::now].id)
#define blockIdx (shim::block)
static inline void __syncthreads() { shim::meet(shim::all, shim::threads.size()); }
static inline void __syncwarp() { shim::meet(shim::warps[shim::now / 32], 32); }
static inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
static inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t by) {
  return (uint32_t)(((uint64_t)high << 32 | low) >> (by & 31));
}
static inline uint32_t __funnelshift_rc(uint32_t low, uint32_t high, uint32_t by) {
  return (uint32_t)(((uint64_t)high << 32 | low) >> std::min(by, 32u));
}
static inline void atomicAdd(float* at, float value) { *at += value; }
static inline uint32_t permuted(uint32_t low, uint32_t high, uint32_t selectors) {
  uint64_t bytes = (uint64_t)high << 32 | low;
  uint32_t found = 0;
  for (int i = 0; i < 4; i++) {
    uint32_t selector = selectors >> 4 * i & 15;
    uint8_t byte = bytes >> 8 * (selector & 7);
    if (selector & 8) byte = byte & 128 ? 255 : 0;
    found |= (uint32_t)byte << 8 * i;
  }
  return found;
}
static inline float widened(uint32_t half) {
  uint32_t bits = half << 16;
  float found;
  memcpy(&found, &bits, 4);
  return found;
}
// m16n8k16 of bf16, with fragments laid out as the PTX manual says.
static inline void multiply(float (&c)[4], const uint32_t (&a)[4], uint2 b) {
  int lane = shim::now % 32;
  auto& all = shim::fragments[shim::now / 32];
  all.c[lane] = c;
  memcpy(all.a[lane], a, 16);
  all.b[lane] = b;
  __syncwarp();
  if (lane == 0) {
    float A[16][16], B[16][8];
    for (int of = 0; of < 32; of++) {
      int group = of / 4, within = of % 4;
      for (int i = 0; i < 4; i++) {
        int row = group + (i & 1) * 8, col = within * 2 + (i >> 1) * 8;
        A[row][col] = widened(all.a[of][i] & 0xFFFF);
        A[row][col + 1] = widened(all.a[of][i] >> 16);
      }
      uint32_t halves[2] = {all.b[of].x, all.b[of].y};
      for (int i = 0; i < 2; i++) {
        B[within * 2 + i * 8][group] = widened(halves[i] & 0xFFFF);
        B[within * 2 + i * 8 + 1][group] = widened(halves[i] >> 16);
      }
    }
    for (int of = 0; of < 32; of++)
      for (int i = 0; i < 4; i++) {
        int row = of / 4 + 8 * (i / 2), col = of % 4 * 2 + i % 2;
        for (int k = 0; k < 16; k++) all.c[of][i] += A[row][k] * B[k][col];
      }
  }
  __syncwarp();
}
static inline void copy16(void* to, const void* from) {
  if (!shim::late) {
    memcpy(to, from, 16);
    return;
  }
  shim::pending[shim::now].back().push_back([=] { memcpy(to, from, 16); });
}
static inline void commit() { shim::pending[shim::now].emplace_back(); }
template <int LEFT>
static inline void wait() {
  auto& groups = shim::pending[shim::now];
  // The last group is still open.
  while ((int)groups.size() > LEFT + 1) {
    for (auto& copy : groups.front()) copy();
    groups.erase(groups.begin());
  }
}

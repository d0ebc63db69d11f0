// The C interface for running a layer.

#include <omp.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "paths.h"
#include "types.h"
#include "weights.h"

using namespace moe_prune;

namespace {

constexpr int64_t TOKENS = 512;    // of an expert that are multiplied by an expansion
constexpr int64_t SUMS = 1 << 18;  // floats of a thread that stay in its caches

}  // namespace

extern "C" {

// The arguments of moe_prune_run; kernels/cpu_library.py has the same list.
struct MoePruneLayer {
  const void* x;         // [tokens][hidden]
  const float* weights;  // [tokens][top_k]
  const int32_t* ids;    // [tokens][top_k], ids of all experts
  const int32_t* expert_map;  // id -> index here, -1: elsewhere; null: the same
  const uint32_t* w13_masks;
  const int64_t* w13_starts;
  const void* w13_values;
  const void* w13_scales;
  const int8_t* w13_zeros;
  const uint32_t* w2_masks;
  const int64_t* w2_starts;
  const void* w2_values;
  const void* w2_scales;
  const int8_t* w2_zeros;
  void* out;  // [tokens][hidden]
  int64_t tokens, top_k, hidden, width, experts, map_size;
  int64_t tile_from;  // tokens of an expert from which AMX tiles are used
  int64_t dot_to;     // and up to which, of those without tiles, dot products of bf16 are
  int64_t threads;    // 0: as many as OpenMP would use
  int64_t w13_group, w2_group;
  int64_t w13_scale_type, w2_scale_type;
  int32_t type, storage, level;
  int32_t dots;  // of integers: what multiplies tokens rounded to int8; NO_DOTS: exact ones
};

void moe_prune_run(const MoePruneLayer* layer) {
  const MoePruneLayer& p = *layer;
  const int64_t bytes = element_bytes(p.type);
  const int64_t k13 = round_up(p.hidden, STEP), k2 = round_up(p.width, STEP);
  const int64_t pairs13 = round_up(p.width, BLOCK) / BLOCK;
  const int64_t pairs2 = round_up(p.hidden, WIDTH) / WIDTH;
  const int64_t bits[] = {8 * bytes, 8, 8, 4};  // in the order of Storage
  const Weights w13{p.w13_masks, p.w13_starts, p.w13_values,
                    p.w13_scales, p.w13_zeros, p.w13_group,
                    p.w13_scale_type, 2 * pairs13, k13, bits[p.storage]};
  const Weights w2{p.w2_masks, p.w2_starts, p.w2_values, p.w2_scales, p.w2_zeros,
                   p.w2_group, p.w2_scale_type, 2 * pairs2, k2, bits[p.storage]};
  const Kernels base = any(p.level, p.type, p.storage);
  const Rounding rounded = rounding(p.dots, p.storage);
  // Dot products of bf16 are for weights that are floats.
  const bool dots = p.type == AS_BF16 && p.level >= BF16 && p.storage < INT8;
  [[maybe_unused]] const int64_t dot_to = dots ? p.dot_to : 0;

  // Tokens sorted by expert; each expert's rows are padded to whole tiles.
  const int64_t slots = p.tokens * p.top_k;
  std::vector<int32_t> expert_of(slots);
  std::vector<int64_t> count(p.experts + 1, 0);
  for (int64_t slot = 0; slot < slots; ++slot) {
    int64_t id = p.ids[slot];
    if (id < 0 || id >= p.map_size) id = -1;
    if (id >= 0 && p.expert_map) id = p.expert_map[id];
    if (id >= p.experts) id = -1;
    expert_of[slot] = static_cast<int32_t>(id);
    if (id >= 0) ++count[id];
  }
  struct Active {
    int64_t expert, rows, first;
    bool tiled;  // rows are kept in tiles, for AMX
  };
  const bool may_tile = p.level == AMX && p.type == AS_BF16;
  std::vector<Active> active;
  std::vector<int64_t> next(p.experts, 0);
  int64_t total_rows = 0, most = 0;
  for (int64_t expert = 0; expert < p.experts; ++expert) {
    if (count[expert] == 0) continue;
    bool tiled = may_tile && count[expert] >= p.tile_from;
    active.push_back({expert, count[expert], total_rows, tiled});
    next[expert] = total_rows;
    total_rows += round_up(count[expert], ROWS);
    most = std::max(most, round_up(count[expert], ROWS));
  }
  std::vector<int64_t> slot_of(total_rows, -1);
  for (int64_t slot = 0; slot < slots; ++slot)
    if (expert_of[slot] >= 0) slot_of[next[expert_of[slot]]++] = slot;

  // Rows a power of two apart would share too few lines of the first-level cache.
  const int64_t stride13 = k13 + STEP, stride2 = k2 + STEP;
  Scratch inputs(total_rows * stride13 * bytes), inner(total_rows * stride2 * bytes);
  // Where columns k to k + STEP of an expert's row are.
  auto place = [&](Scratch& buffer, int64_t stride, const Active& a, int64_t row,
                   int64_t k) {
    int64_t columns = stride - STEP, at = row * stride + k;
    if (a.tiled) {
      int64_t tile = row / ROWS * (columns / STEP) + k / STEP;
      at = (tile * ROWS + row % ROWS) * STEP + k % STEP;
    }
    return buffer.data + (a.first * stride + at) * bytes;
  };
  // Rows that are not tiled, rounded, if they are.
  const int64_t bytes13 = rounded.round ? Rounded::stride(k13) : 0;
  const int64_t bytes2 = rounded.round ? Rounded::stride(k2) : 0;
  Scratch rounded13(total_rows * bytes13), rounded2(total_rows * bytes2);
  const int64_t n_active = static_cast<int64_t>(active.size());

  // Pairs that one thread takes at a time: several, where they share tokens in tiles, but
  // so few that all threads have work until the end, and that their sums stay in caches.
  const int64_t threads = p.threads ? p.threads : omp_get_max_threads();
  int64_t group13 = std::clamp<int64_t>(n_active * pairs13 / (4 * threads), 1, GROUP);
  // Whole steps of what is rounded.
  if (rounded.round) group13 = round_up(group13, STEP / BLOCK);
  const int64_t fit = std::max<int64_t>(1, SUMS / (std::max<int64_t>(p.tokens, 1) * WIDTH));
  const int64_t group2 =
      std::clamp<int64_t>(pairs2 / (4 * threads), 1, std::min<int64_t>(GROUP, fit));
  const int64_t groups13 = (pairs13 + group13 - 1) / group13;
  const int64_t groups2 = (pairs2 + group2 - 1) / group2;
  const int64_t y_rows = std::min(most, TOKENS);

#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    std::vector<float> y(std::max(group13, group2) * y_rows * WIDTH);
    std::vector<float> sums(group2 * p.tokens * WIDTH);
#ifdef MOE_PRUNE_AMX
    if (may_tile) amx_begin();
#endif
    // y[pairs][y_rows][WIDTH] of some rows of an expert, TOKENS at most.
    auto multiply = [&](const Weights& w, const Active& a, int64_t first, int64_t pairs,
                        Scratch& buffer, int64_t stride, const Scratch& integers,
                        int64_t integers_stride, int64_t row, int64_t rows) {
      Stream blocks[2 * GROUP];
      for (int64_t i = 0; i < pairs; ++i)
        w.pair(a.expert, first + i, blocks + 2 * i);
      const void* x = place(buffer, stride, a, row, 0);
      PairKernel kernel = base.pair;
#ifdef MOE_PRUNE_BF16
      if (a.rows <= dot_to) kernel = p.storage == E4M3 ? pair_expand_f8 : pair_expand;
#endif
#ifdef MOE_PRUNE_AMX
      if (a.tiled && rows > 2 * ROWS)
        return TILES[p.storage].pairs(blocks, pairs, x, rows, w.k, y.data(),
                                      y_rows * WIDTH);
      if (a.tiled) kernel = TILES[p.storage].pair;
#endif
      if (rounded.round && !a.tiled) {
        kernel = rounded.pair;
        x = integers.data + (a.first + row) * integers_stride;
        stride = integers_stride;
      }
      for (int64_t i = 0; i < pairs; ++i)
        kernel(blocks + 2 * i, x, stride, rows, w.k, y.data() + i * y_rows * WIDTH);
    };
    // As even as possible, in whole tiles.
    auto each_part = [&](const Active& a, auto&& use) {
      const int64_t parts = (a.rows + TOKENS - 1) / TOKENS;
      const int64_t step = round_up((a.rows + parts - 1) / parts, 2 * ROWS);
      for (int64_t row = 0; row < a.rows; row += step)
        use(row, std::min(step, a.rows - row));
    };

    for (const Active& a : active) {
      int64_t padded = a.tiled ? round_up(a.rows, ROWS) : a.rows;
#pragma omp for schedule(static) nowait
      for (int64_t row = 0; row < padded; ++row) {
        int64_t slot = slot_of[a.first + row];
        auto token = static_cast<const char*>(p.x) + slot / p.top_k * p.hidden * bytes;
        if (rounded.round && !a.tiled)
          rounded.round(token, p.type, p.hidden, k13, 0, k13,
                        rounded13.data + (a.first + row) * bytes13);
        else for (int64_t k = 0; k < k13; k += STEP) {
          char* target = place(inputs, stride13, a, row, k);
          int64_t held = slot < 0 ? 0 : std::clamp<int64_t>(p.hidden - k, 0, STEP);
          std::memcpy(target, token + k * bytes, held * bytes);
          std::memset(target + held * bytes, 0, (STEP - held) * bytes);
        }
        // The activation leaves the second half of the last step unwritten here.
        if (pairs13 % 2)
          std::memset(place(inner, stride2, a, row, pairs13 * BLOCK), 0, BLOCK * bytes);
      }
    }
#pragma omp barrier

#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < n_active * groups13; ++task) {
      const Active& a = active[task / groups13];
      const int64_t first = task % groups13 * group13;
      const int64_t pairs = std::min(group13, pairs13 - first);
      each_part(a, [&](int64_t start, int64_t rows) {
        multiply(w13, a, first, pairs, inputs, stride13, rounded13, bytes13, start, rows);
        for (int64_t i = 0; i < pairs; ++i) {
          const float* found = y.data() + i * y_rows * WIDTH;
          const int64_t column = (first + i) * BLOCK;
          if (!a.tiled)
            base.activate(found, rows, place(inner, stride2, a, start, column), stride2);
          for (int64_t row = 0; a.tiled && row < rows; row += ROWS)
            base.activate(found + row * WIDTH, ROWS,
                          place(inner, stride2, a, start + row, column), STEP);
        }
        if (rounded.round && !a.tiled)
          for (int64_t row = start; row < start + rows; ++row)
            rounded.round(place(inner, stride2, a, row, 0), p.type, k2, k2, first * BLOCK,
                          round_up((first + pairs) * BLOCK, STEP),
                          rounded2.data + (a.first + row) * bytes2);
      });
    }

#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < groups2; ++task) {
      const int64_t first = task * group2, pairs = std::min(group2, pairs2 - first);
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (const Active& a : active)
        each_part(a, [&](int64_t start, int64_t rows) {
          multiply(w2, a, first, pairs, inner, stride2, rounded2, bytes2, start, rows);
          for (int64_t row = 0; row < rows; ++row) {
            const int64_t slot = slot_of[a.first + start + row];
            const float weight = p.weights[slot];
            for (int64_t i = 0; i < pairs; ++i) {
              float* sum = sums.data() + (slot / p.top_k * group2 + i) * WIDTH;
              const float* found = y.data() + (i * y_rows + row) * WIDTH;
              for (int n = 0; n < WIDTH; ++n) sum[n] += weight * found[n];
            }
          }
        });
      const int64_t width = std::min(pairs * WIDTH, p.hidden - first * WIDTH);
      for (int64_t token = 0; token < p.tokens; ++token) {
        const float* sum = sums.data() + token * group2 * WIDTH;
        const int64_t at = token * p.hidden + first * WIDTH;
        for (int64_t n = 0; n < width; ++n) switch (p.type) {
            case AS_BF16: static_cast<Bf16*>(p.out)[at + n] = Bf16::of(sum[n]); break;
            case AS_F16: static_cast<F16*>(p.out)[at + n] = F16::of(sum[n]); break;
            default: static_cast<float*>(p.out)[at + n] = sum[n];
          }
      }
    }
#ifdef MOE_PRUNE_AMX
    if (may_tile) amx_end();
#endif
  }
}

}  // extern "C"

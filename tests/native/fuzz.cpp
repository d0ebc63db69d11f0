// Random layers through every path of the CPU kernel, in memory that ends where it must:
// address and undefined-behavior sanitizers watch, and paths are compared.
// Arguments: rounds, seed.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <type_traits>
#include <vector>

#include "../../vllm_moe_prune/kernels/cpu/moe.h"
#include "../../vllm_moe_prune/kernels/cpu/types.h"

using namespace moe_prune;

extern "C" {
struct MoePruneLayer {
  const void* x;
  const float* weights;
  const int32_t *ids, *expert_map;
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
  void* out;
  int64_t tokens, top_k, hidden, width, experts, map_size, tile_from, dot_to, threads;
  int64_t w13_group, w2_group, w13_scale_type, w2_scale_type;
  int32_t type, storage, level, dots;
};
int32_t moe_prune_level();
int32_t moe_prune_dots();
void moe_prune_encode(const void* const*, int64_t, int64_t, int64_t, int32_t, uint32_t*,
                      int64_t*, void*);
struct MoePruneStored {
  const uint8_t* mask;
  const void* values;
  const int64_t* starts;
  int64_t cols, first_row, first_col;
};
void moe_prune_encode_stored(const MoePruneStored*, int64_t, int64_t, int64_t, int32_t,
                             uint32_t*, int64_t*, void*);
void moe_prune_run(const MoePruneLayer*);
struct MoePruneLinear {
  const void *x, *values, *scales;
  const int8_t* zeros;
  void* out;
  int64_t tokens, inputs, outputs, group, scale_type, threads;
  int32_t type, storage, level, dots;
};
void moe_prune_linear(const MoePruneLinear*);
}

namespace {

std::mt19937 rng;

int64_t below(int64_t end) { return static_cast<int64_t>(rng() % end); }

template <class T>
T of(float value) {
  return T::of(value);
}

// Any of those that a normal distribution is likely to give, denormals too.
template <>
F8 of<F8>(float value) {
  if (value == 0.0f) return {0};
  auto size = static_cast<uint8_t>(std::fmin(std::fabs(value) * 200, 0x37));
  return {static_cast<uint8_t>(size | (value < 0 ? 0x80 : 0))};
}

template <class T>
std::vector<T> matrix(int64_t count, double zeros) {
  std::vector<T> made(count);
  std::normal_distribution<float> normal(0, 0.2f);
  for (T& value : made) value = of<T>(rng() % 1000 < zeros * 1000 ? 0.0f : normal(rng));
  return made;
}

// Exactly as large as the format says, so that one byte too far is seen.
template <class T>
struct Encoded {
  std::vector<uint32_t> masks;
  std::vector<int64_t> starts;
  std::vector<T> values;
  std::vector<float> scales;

  const float* scales_or_null() const {
    return std::is_same<T, F8>::value ? scales.data() : nullptr;
  }

  void add(const std::vector<std::vector<T>>& sources, int64_t rows, int64_t cols) {
    int64_t n = static_cast<int64_t>(sources.size());
    int64_t blocks = round_up(n * round_up(rows, BLOCK) / BLOCK, 2);
    std::vector<const void*> pointers;
    int64_t stored = 0;
    for (auto& source : sources) {
      pointers.push_back(source.data());
      for (T value : source) {
        static const T zero = of<T>(0.0f);
        stored += std::memcmp(&value, &zero, sizeof value) != 0;
      }
    }
    std::vector<uint32_t> more(blocks * round_up(cols, STEP) / 2);
    std::vector<int64_t> begins(blocks + 1);
    std::vector<T> found(stored);
    moe_prune_encode(pointers.data(), n, rows, cols, sizeof(T), more.data(),
                     begins.data(), found.data());
    if (begins[blocks] != stored) std::abort();
    if (cols % 8 == 0) same_from_stored(sources, rows, cols, more, begins, found);
    for (int64_t i = 0; i < blocks * round_up(cols, STEP) / STEP; ++i)
      scales.push_back(0.2f + 0.1f * static_cast<float>(below(4)));
    for (int64_t& begin : begins) begin += static_cast<int64_t>(values.size());
    masks.insert(masks.end(), more.begin(), more.end());
    starts.insert(starts.end(), begins.begin(), begins.end());
    values.insert(values.end(), found.begin(), found.end());
  }

  // Matrices stored without their zeros, as the middle of larger ones: the same blocks.
  static void same_from_stored(const std::vector<std::vector<T>>& sources, int64_t rows,
                               int64_t cols, const std::vector<uint32_t>& masks,
                               const std::vector<int64_t>& begins,
                               const std::vector<T>& values) {
    static const T zero = of<T>(0.0f), other = of<T>(1.0f);
    const int64_t row = below(3), col = 8 * below(3), wide = cols + col + 8 * below(2);
    std::vector<std::vector<uint8_t>> bits;
    std::vector<std::vector<T>> kept;
    std::vector<std::vector<int64_t>> starts;
    std::vector<MoePruneStored> stored;
    for (auto& source : sources) {
      bits.emplace_back((row + rows) * wide / 8);
      kept.emplace_back();
      starts.emplace_back(1, 0);
      for (int64_t r = 0; r < row + rows; ++r) {
        for (int64_t c = 0; c < wide; ++c) {
          bool inside = r >= row && c >= col && c < col + cols;
          T value = inside ? source[(r - row) * cols + c - col] : other;
          // Fixed rates store some zeros, too.
          bool store = std::memcmp(&value, &zero, sizeof value) != 0 || rng() % 8 == 0;
          if (!store) continue;
          bits.back()[(r * wide + c) / 8] |= static_cast<uint8_t>(1 << c % 8);
          kept.back().push_back(value);
        }
        starts.back().push_back(static_cast<int64_t>(kept.back().size()));
      }
      kept.back().shrink_to_fit();
    }
    for (size_t i = 0; i < sources.size(); ++i)
      stored.push_back({bits[i].data(), kept[i].data(), starts[i].data(), wide, row, col});
    std::vector<uint32_t> more(masks.size());
    std::vector<int64_t> counts(begins.size());
    std::vector<T> found(values.size());
    moe_prune_encode_stored(stored.data(), static_cast<int64_t>(stored.size()), rows, cols,
                            sizeof(T), more.data(), counts.data(), found.data());
    const size_t bytes = found.size() * sizeof(T);
    const bool same = bytes == 0 || std::memcmp(found.data(), values.data(), bytes) == 0;
    if (more != masks || counts != begins || !same) std::abort();
  }

  void finish() {
    values.insert(values.end(), TAIL, of<T>(0.0f));
    scales.shrink_to_fit();
    values.shrink_to_fit();
  }
};

// The layer from a level on; all must agree with the first.
template <class T>
void run_levels(MoePruneLayer layer, int32_t from, std::vector<T>& out) {
  std::vector<float> first;
  for (int32_t level = from; level <= moe_prune_level(); ++level) {
    layer.level = level;
    layer.tile_from = 1 + below(6);
    layer.dot_to = below(20);
    layer.threads = below(3);
    moe_prune_run(&layer);
    if (first.empty()) first.assign(out.begin(), out.end());
    for (size_t i = 0; i < out.size(); ++i) {
      float found = out[i];
      if (!(std::fabs(found - first[i]) <= 0.02f + 0.02f * std::fabs(first[i]))) {
        std::printf("level %d: %g, level %d: %g\n", level, found, from, first[i]);
        std::exit(1);
      }
    }
  }
}

// A linear layer of integers, exact on every level, then with rounded tokens.
template <class T>
void run_linear(MoePruneLinear linear) {
  std::vector<T> x = matrix<T>(linear.tokens * linear.inputs, 0);
  std::vector<T> out(linear.tokens * linear.outputs);
  std::vector<float> exact;
  linear.x = x.data();
  linear.out = out.data();
  for (int32_t level = 0, dots = NO_DOTS; dots <= DOTS_AVX512VNNI;) {
    linear.level = level;
    linear.dots = dots;
    linear.threads = below(3);
    moe_prune_linear(&linear);
    if (exact.empty()) exact.assign(out.begin(), out.end());
    for (size_t i = 0; i < out.size(); ++i) {
      const float found = out[i];
      if (!(std::fabs(found - exact[i]) <= 0.03f + 0.03f * std::fabs(exact[i]))) {
        std::printf("linear, level %d, dots %d: %g, exact: %g\n", level, dots, found, exact[i]);
        std::exit(1);
      }
    }
    if (level < moe_prune_level()) {
      ++level;
      continue;
    }
    if (linear.group % STEP) return;
    do dots = dots ? 2 * dots : 1;
    while (dots <= DOTS_AVX512VNNI && !(moe_prune_dots() & dots));
  }
}

// Integers of so many bits; T: what tokens are, S: what scales are.
template <class T, class S>
void round_integers(int32_t type, int32_t scale_type, int64_t bits) {
  int64_t hidden = 1 + below(below(6) ? 90 : 1200), width = 1 + below(90);
  int64_t experts = 1 + below(5), tokens = 1 + below(below(4) ? 12 : 300);
  int64_t k13 = round_up(hidden, STEP), k2 = round_up(width, STEP);
  int64_t group13 = below(2) ? STEP : k13, group2 = below(3) ? STEP : below(2) ? 8 : k2;
  int64_t blocks13 = experts * 2 * (round_up(width, BLOCK) / BLOCK);
  int64_t blocks2 = experts * 2 * (round_up(hidden, WIDTH) / WIDTH);
  auto words = [&](int64_t blocks, int64_t k) {
    std::vector<uint32_t> made(blocks * BLOCK * k * bits / 32);
    for (uint32_t& word : made) word = static_cast<uint32_t>(rng());
    return made;
  };
  auto scales = [&](int64_t blocks, int64_t groups) {
    std::vector<S> made(blocks * groups * BLOCK);
    for (S& one : made)
      one = of<S>((static_cast<float>(below(9)) - 4) * 0.02f / (1 << bits));
    return made;
  };
  auto zeros = [&](int64_t blocks, int64_t groups) {
    std::vector<int8_t> made(blocks * groups * BLOCK);
    for (int8_t& one : made) one = static_cast<int8_t>(below(1 << bits) - (1 << bits) / 2);
    return made;
  };
  std::vector<uint32_t> w13 = words(blocks13, k13), w2 = words(blocks2, k2);
  std::vector<S> s13 = scales(blocks13, k13 / group13), s2 = scales(blocks2, k2 / group2);
  std::vector<int8_t> z13 = zeros(blocks13, k13 / group13), z2 = zeros(blocks2, k2 / group2);
  std::vector<T> x = matrix<T>(tokens * hidden, 0), out(tokens * hidden);
  std::vector<float> weights(tokens, 0.5f);
  std::vector<int32_t> ids(tokens);
  for (int32_t& id : ids) id = static_cast<int32_t>(below(experts));
  bool shifted = below(2);
  MoePruneLayer layer{
      x.data(), weights.data(), ids.data(), nullptr, nullptr, nullptr, w13.data(), s13.data(),
      shifted ? z13.data() : nullptr, nullptr, nullptr, w2.data(), s2.data(),
      shifted ? z2.data() : nullptr, out.data(), tokens, 1, hidden, width, experts, experts,
      0, 0, 0, group13, group2, scale_type, scale_type, type, bits == 4 ? INT4 : INT8, 0,
      NO_DOTS};
  run_levels(layer, 0, out);
  run_linear<T>({nullptr, w2.data(), s2.data(), shifted ? z2.data() : nullptr, nullptr,
                 tokens, width, hidden, group2, scale_type, 0, type,
                 bits == 4 ? INT4 : INT8, 0, NO_DOTS});
  if (group2 % STEP) return;
  // Rounded tokens: close to exact ones, and to each other much closer.
  std::vector<T> rounded[3];
  for (int i = 0; i < 3; ++i) {
    layer.level = moe_prune_level();
    layer.dots = 1 << i;
    layer.tile_from = 1 << 30;
    layer.threads = below(3);
    if (!(moe_prune_dots() & layer.dots)) continue;
    rounded[i].assign(out.size(), of<T>(0.0f));
    layer.out = rounded[i].data();
    moe_prune_run(&layer);
    for (size_t at = 0; at < out.size(); ++at) {
      const float found = rounded[i][at], exact = out[at];
      const float first = rounded[0][at];
      if (!(std::fabs(found - exact) <= 0.03f + 0.03f * std::fabs(exact)) ||
          !(std::fabs(found - first) <= 0.005f + 0.01f * std::fabs(first))) {
        std::printf("dots %d: %g, AVX2: %g, exact: %g\n", 1 << i, found, first, exact);
        std::exit(1);
      }
    }
  }
}

// T: what tokens are, V: what weights are.
template <class T, class V>
void round(int32_t type) {
  // Longer than what is expanded at once, and more tokens than share that: now and then.
  int64_t hidden = 1 + below(below(6) ? 90 : 1200), width = 1 + below(90);
  int64_t experts = 1 + below(5), top_k = 1 + below(experts);
  int64_t tokens = 1 + below(below(4) ? 12 : below(4) ? 80 : 1200);
  const double shares[] = {0.0, 0.4, 0.5, 0.65, 0.97, 1.0};
  double zeros = shares[below(6)];
  Encoded<V> w13, w2;
  for (int64_t expert = 0; expert < experts; ++expert) {
    w13.add({matrix<V>(width * hidden, zeros), matrix<V>(width * hidden, zeros)}, width,
            hidden);
    w2.add({matrix<V>(hidden * width, zeros)}, hidden, width);
  }
  w13.finish();
  w2.finish();
  std::vector<T> x = matrix<T>(tokens * hidden, 0), out(tokens * hidden);
  std::vector<float> weights(tokens * top_k, 0.5f);
  std::vector<int32_t> ids(tokens * top_k), map(experts + 2, -1);
  for (int32_t& id : ids) id = static_cast<int32_t>(below(experts + 4) - 1);
  for (int64_t expert = 0; expert < experts; ++expert)
    map[below(experts + 2)] = static_cast<int32_t>(expert);
  bool mapped = below(2);
  run_levels(
      MoePruneLayer{x.data(), weights.data(), ids.data(), mapped ? map.data() : nullptr,
                    w13.masks.data(), w13.starts.data(), w13.values.data(),
                    w13.scales_or_null(), nullptr, w2.masks.data(), w2.starts.data(),
                    w2.values.data(), w2.scales_or_null(), nullptr, out.data(), tokens, top_k,
                    hidden, width, experts, mapped ? experts + 2 : experts, 0, 0, 0, 0, 0, 0, 0,
                    type, std::is_same<V, F8>::value ? E4M3 : AS_TOKENS, 0, NO_DOTS},
      0, out);
}

}  // namespace

int main(int, char** arguments) {
  rng.seed(static_cast<uint32_t>(std::atoi(arguments[2])));
  for (int rounds = std::atoi(arguments[1]); rounds > 0; --rounds) {
    round<Bf16, Bf16>(AS_BF16);
    round<F16, F16>(AS_F16);
    round<F32, F32>(AS_F32);
    round<Bf16, F8>(AS_BF16);
    round<F16, F8>(AS_F16);
    round<F32, F8>(AS_F32);
    for (int64_t bits = 4; bits <= 8; bits += 4) {
      round_integers<Bf16, Bf16>(AS_BF16, AS_BF16, bits);
      round_integers<F16, F16>(AS_F16, AS_F16, bits);
      round_integers<F32, F32>(AS_F32, AS_F32, bits);
      round_integers<F32, F16>(AS_F32, AS_F16, bits);
    }
  }
  std::printf("%d levels agree\n", moe_prune_level() + 1);
}

// The C interface while loading: dense matrices as blocks, stored ones as dense.

#include <algorithm>
#include <cstring>
#include <vector>

#include "moe.h"

using namespace moe_prune;

extern "C" {

// A matrix without its zeros (``Stored`` of cpu_library.py), and where the part of it
// begins that is wanted.
struct MoePruneStored {
  const uint8_t* mask;
  const void* values;
  const int64_t* starts;
  int64_t cols, first_row, first_col;
};
}

namespace {

// Some steps of a block from dense rows; returns how many values they have.
template <class Bits>
int64_t encode_piece(const Bits piece[BLOCK][PIECE], int64_t steps, uint32_t* masks,
                     Bits* values) {
  int64_t count = 0;
  for (int64_t step = 0; step < steps; ++step) {
    uint32_t mask = 0;
    for (int lane = 0; lane < 32; ++lane) {
      Bits value = piece[lane >> 1][2 * step + (lane & 1)];
      mask |= static_cast<uint32_t>(value != 0) << lane;
      values[count] = value;
      count += value != 0;
    }
    masks[step] = mask;
  }
  return count;
}

// One row of a stored matrix, dense.
template <class Bits>
void unpack_row(const uint8_t* bits, const Bits* values, int64_t cols, Bits* out) {
  for (int64_t byte = 0; byte < cols / 8; ++byte, out += 8) {
    for (int bit = 0; bit < 8; ++bit) out[bit] = 0;
    for (uint32_t left = bits[byte]; left != 0; left &= left - 1)
      out[__builtin_ctz(left)] = *values++;
  }
}

// The fastest that this processor has of both.
template <class Bits>
struct Ways {
  int64_t (*encode)(const Bits[BLOCK][PIECE], int64_t, uint32_t*, Bits*) = encode_piece<Bits>;
  void (*unpack)(const uint8_t*, const Bits*, int64_t, Bits*) = unpack_row<Bits>;

  Ways() {
#ifdef MOE_PRUNE_X86
    if constexpr (sizeof(Bits) == 2)
      if (moe_prune_level() >= VBMI2) {
        encode = vbmi2::encode_piece;
        unpack = vbmi2::unpack_row;
      }
#endif
  }
};

// One block of 16 rows (null: zeros) from a dense matrix; returns how many values it has.
template <class Bits>
int64_t encode_block(const Ways<Bits>& ways, const Bits* rows[BLOCK], int64_t cols,
                     uint32_t* masks, Bits* values) {
  alignas(64) Bits local[BLOCK][PIECE];
  int64_t count = 0;
  for (int64_t k0 = 0; k0 < round_up(cols, STEP); k0 += PIECE) {
    // Rows lie powers of two apart; read one element each, they would evict each other.
    int64_t held = std::clamp<int64_t>(cols - k0, 0, PIECE);
    std::memset(local, 0, sizeof local);
    for (int row = 0; row < BLOCK; ++row)
      if (rows[row]) std::memcpy(local[row], rows[row] + k0, held * sizeof(Bits));
    int64_t steps = std::min<int64_t>(PIECE, round_up(cols, STEP) - k0) / 2;
    count += ways.encode(local, steps, masks + k0 / 2, values + count);
  }
  return count;
}

// The 16 rows of a block, from dense matrices. Blocks of several matrices alternate.
template <class Bits>
struct DenseRows {
  const void* const* sources;
  int64_t n_sources, rows, cols;

  void operator()(int64_t block, const Bits* pointers[BLOCK]) {
    auto source = static_cast<const Bits*>(sources[block % n_sources]);
    for (int i = 0; i < BLOCK; ++i) {
      int64_t row = block / n_sources * BLOCK + i;
      pointers[i] = row < rows ? source + row * cols : nullptr;
    }
  }
};

// The same from stored matrices, of which rows and columns from the first ones on are
// taken. Rows are expanded into memory of the copy's own: every thread has one.
template <class Bits>
struct StoredRows {
  const MoePruneStored* sources;
  int64_t n_sources, rows;
  std::vector<Bits> dense = {};

  void operator()(int64_t block, const Bits* pointers[BLOCK]) {
    const Ways<Bits> ways;
    const MoePruneStored& source = sources[block % n_sources];
    dense.resize(BLOCK * source.cols);
    auto values = static_cast<const Bits*>(source.values);
    for (int i = 0; i < BLOCK; ++i) {
      int64_t row = block / n_sources * BLOCK + i;
      pointers[i] = nullptr;
      if (row >= rows) continue;
      row += source.first_row;
      Bits* out = dense.data() + i * source.cols;
      ways.unpack(source.mask + row * (source.cols / 8), values + source.starts[row],
                  source.cols, out);
      pointers[i] = out + source.first_col;
    }
  }
};

template <class Bits, class Rows>
void encode(const Rows& rows_of, int64_t n_sources, int64_t rows, int64_t cols,
            uint32_t* masks, int64_t* starts, void* values_bytes) {
  int64_t blocks = round_up(n_sources * round_up(rows, BLOCK) / BLOCK, 2);
  int64_t steps = round_up(cols, STEP) / 2;
  auto values = static_cast<Bits*>(values_bytes);
  const Ways<Bits> ways;
  starts[0] = 0;
#pragma omp parallel
  {
    Rows rows_here = rows_of;
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
      const Bits* pointers[BLOCK];
      rows_here(block, pointers);
      int64_t count = 0;
      for (const Bits* row : pointers)
        if (row)
          for (int64_t k = 0; k < cols; ++k) count += row[k] != 0;
      starts[block + 1] = count;
    }
  }
  for (int64_t block = 0; block < blocks; ++block) starts[block + 1] += starts[block];
#pragma omp parallel
  {
    Rows rows_here = rows_of;
    std::vector<Bits> local(BLOCK * (steps * 2 + 2));
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
      const Bits* pointers[BLOCK];
      rows_here(block, pointers);
      int64_t count =
          encode_block(ways, pointers, cols, masks + block * steps, local.data());
      std::copy_n(local.data(), count, values + starts[block]);
    }
  }
}

template <class Bits>
void encode_dense(const void* const* sources, int64_t n_sources, int64_t rows,
                  int64_t cols, uint32_t* masks, int64_t* starts, void* values) {
  encode<Bits>(DenseRows<Bits>{sources, n_sources, rows, cols}, n_sources, rows, cols,
               masks, starts, values);
}

template <class Bits>
void encode_stored(const MoePruneStored* sources, int64_t n_sources, int64_t rows,
                   int64_t cols, uint32_t* masks, int64_t* starts, void* values) {
  encode<Bits>(StoredRows<Bits>{sources, n_sources, rows}, n_sources, rows, cols, masks,
               starts, values);
}

template <class Bits>
void unpack(const uint8_t* mask, const void* values_bytes, const int64_t* starts,
            int64_t rows, int64_t cols, void* dense_bytes) {
  auto values = static_cast<const Bits*>(values_bytes);
  auto dense = static_cast<Bits*>(dense_bytes);
  const Ways<Bits> ways;
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; ++row)
    ways.unpack(mask + row * (cols / 8), values + starts[row], cols, dense + row * cols);
}

}  // namespace

extern "C" {

void moe_prune_encode(const void* const* sources, int64_t n_sources, int64_t rows,
                      int64_t cols, int32_t bytes, uint32_t* masks, int64_t* starts,
                      void* values) {
  auto encode = bytes == 1   ? encode_dense<uint8_t>
                : bytes == 2 ? encode_dense<uint16_t>
                             : encode_dense<uint32_t>;
  encode(sources, n_sources, rows, cols, masks, starts, values);
}

// The same from matrices stored without their zeros; values holds as many as they do.
void moe_prune_encode_stored(const MoePruneStored* sources, int64_t n_sources,
                             int64_t rows, int64_t cols, int32_t bytes, uint32_t* masks,
                             int64_t* starts, void* values) {
  auto encode = bytes == 1   ? encode_stored<uint8_t>
                : bytes == 2 ? encode_stored<uint16_t>
                             : encode_stored<uint32_t>;
  encode(sources, n_sources, rows, cols, masks, starts, values);
}

void moe_prune_unpack(const uint8_t* mask, const void* values, const int64_t* starts,
                      int64_t rows, int64_t cols, int32_t bytes, void* dense) {
  if (bytes == 1) unpack<uint8_t>(mask, values, starts, rows, cols, dense);
  if (bytes == 2) unpack<uint16_t>(mask, values, starts, rows, cols, dense);
  if (bytes == 4) unpack<uint32_t>(mask, values, starts, rows, cols, dense);
}

}  // extern "C"

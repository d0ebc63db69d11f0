"""planes.cu compiled for the CPU, as it is or so that it can make mistakes."""

import ctypes
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bench.gpu.planes.layout import Bits, Planes, fragments

HERE = Path(__file__).parent
RUN = """
extern "C" int run(int tiles, const char* values, const uint32_t* masks,
                   const uint32_t* firsts, const uint16_t* until, const uint2* tokens,
                   float* sums, int blocks, int segments, int strips, unsigned seed,
                   int mistake) {
  int bytes = TABLE + blocks * 4 * tiles * 256 + WARPS * RING_BYTES;
  std::vector<char> shared(bytes, (char)0xCD);
  char* at = shared.data();
  shim::mistake = mistake;
  shim::launch((strips + WARPS - 1) / WARPS, segments, WARPS * 32, seed, [&] {
    auto* of = tiles == 1 ? product<1> : product<2>;
    of(values, masks, firsts, until, tokens, sums, blocks, segments, strips, at);
  });
  return 0;
}
"""
NONE = -1


def compiled(
    folder: Path, ring: int, mistakes: Sequence[tuple[str, str]] = ()
) -> ctypes.CDLL:
    """A library with ``run``.

    Args:
        folder: Where it is made.
        ring: Rows in shared memory.
        mistakes: Pieces of the source, and what stands there instead: in C++, with
            MISTAKE(number) where number one is made.
    """
    source = (HERE / "planes.cu").read_text("utf-8")
    for old, new in mistakes:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    defined = [f"#define RING_ROWS {ring}", "#define EMULATED", '#include "shim.h"']
    path, library = folder / f"planes{ring}.cpp", folder / f"planes{ring}.so"
    path.write_text("\n".join([*defined, source, RUN]), "utf-8")
    how = ["-O1", "-std=c++17", "-shared", "-fPIC", "-w", f"-I{HERE}"]
    subprocess.run(["g++", *how, "-o", library, path], check=True)
    return ctypes.CDLL(str(library))


def product(
    library: ctypes.CDLL, planes: Planes, x_TK: Bits, seed: int, mistake: int = NONE
) -> npt.NDArray[np.float32]:
    """Tokens, 8 or 16, times a matrix: [N, T]."""
    tiles = len(x_TK) // 8
    sums = np.zeros((planes.rows, 8 * tiles), np.float32)
    parts = (*planes[:4], fragments(x_TK, tiles), sums)
    pointers = [ctypes.c_void_p(part.ctypes.data) for part in parts]
    library.run(tiles, *pointers, *planes.sizes, seed, mistake)
    return sums

"""bench/gpu/planes on a CPU: every thread a coroutine, in an order drawn from a seed.

Mistakes in what is read, and in when it was asked for, are caught. That a barrier of a
warp is missing is not: its lanes meet at every mma here, and which accesses a GPU lets
race the shim does not know. That is for racecheck (``make gpu-check``).
"""

import ctypes

import numpy as np
import numpy.typing as npt
import pytest

from bench.gpu.planes.emulate import NONE, compiled, product
from bench.gpu.planes.layout import Bits, TooUnequalError, encode

SEEDS = (0, 1, 2, 3)
MISTAKES = {
    "a copy too few is waited for": (
        "    wait<AHEAD>();",
        "    if (MISTAKE(0)) wait<AHEAD + 1>(); else wait<AHEAD>();",
    ),
    "a window wraps": (
        "if (!(asked & (RING - 1))) {",
        "if (!(asked & (RING - 1)) && !MISTAKE(1)) {",
    ),
    "asked for a block too late": (
        "ask(goals[block + 1]);",
        "ask(goals[block + (MISTAKE(2) ? 0 : 1)]);",
    ),
    "asked for more than the ring holds": (
        "ask(goals[0]);",
        "ask(goals[0] + (MISTAKE(3) ? UNIT * 2 : 0));",
    ),
    "segments do not add up": (
        "if (segments == 1)",
        "if (segments == 1 || MISTAKE(4))",
    ),
    "spare warps count": ("if (spare) return;", "if (spare && !MISTAKE(5)) return;"),
    "a mask is a block old": (
        "min(block + 1, blocks - 1)",
        "min(block + (MISTAKE(6) ? 0 : 1), blocks - 1)",
    ),
    "values of the second half begin too early": (
        "uint32_t first = __popc(mask & 0xFu << 8 * at) * 8;",
        "uint32_t first = __popc(mask & (MISTAKE(7) ? 0x7u : 0xFu) << 8 * at) * 8;",
    ),
    "the ring is taken for half as long": (
        "((bit & (RING - 1) * 32) << 3)",
        "((bit & ((MISTAKE(8) ? RING / 2 : RING) - 1) * 32) << 3)",
    ),
    "zeros are not zero": (
        "how, how, 0xBBAA)",
        "how, how, MISTAKE(9) ? 0xBBBB : 0xBBAA)",
    ),
}


def bf16(values: npt.ArrayLike) -> Bits:
    bits = np.asarray(values, np.float32).view(np.uint32)
    return ((bits + 0x8000) >> 16).astype(np.uint16)


def widened(bits: Bits) -> npt.NDArray[np.float64]:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def matrix(rows: int, cols: int, zeros: float) -> Bits:
    random = np.random.default_rng(0)
    kept = random.random((rows, cols)) >= zeros
    return bf16(random.standard_normal((rows, cols))) * kept.astype(np.uint16)


def is_right(
    library: ctypes.CDLL,
    ring: int,
    sizes: tuple[int, int, int, float, int],
    seed: int,
    mistake: int = NONE,
) -> bool:
    rows, cols, segments, zeros, tokens = sizes
    weight = matrix(rows, cols, zeros)
    x = bf16(np.random.default_rng(1).standard_normal((tokens, cols)))
    found = product(library, encode(weight, segments, ring), x, seed, mistake)
    wanted = widened(weight) @ widened(x).T
    error = np.abs(found - wanted).max()
    return bool(error <= 1e-5 * max(np.abs(wanted).max(), 1e-30))


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled(tmp_path_factory.mktemp("right"), 64)


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("mistaken")
    return compiled(folder, 32, list(MISTAKES.values()))


@pytest.mark.parametrize(
    "sizes",
    [
        (16, 64, 1, 0.5, 8),
        (144, 512, 1, 0.5, 8),
        (32, 1024, 2, 0.65, 16),
        (16, 1024, 1, 0.0, 8),
        (16, 256, 1, 1.0, 16),
        (48, 1024, 1, 0.95, 16),
    ],
)
def test_products_are_those_of_the_matrix(
    right: ctypes.CDLL, sizes: tuple[int, int, int, float, int]
) -> None:
    assert all(is_right(right, 64, sizes, seed) for seed in SEEDS[:2])


HARD = ((32, 1024, 2, 0.5, 8), (16, 512, 1, 0.01, 8))
"""The second uses all of a ring: what comes too late or too early is seen."""


def test_without_a_mistake_all_is_right(mistaken: ctypes.CDLL) -> None:
    assert all(is_right(mistaken, 32, sizes, seed) for sizes in HARD for seed in SEEDS)


@pytest.mark.parametrize("number", range(len(MISTAKES)), ids=list(MISTAKES))
def test_a_mistake_is_caught(mistaken: ctypes.CDLL, number: int) -> None:
    assert not all(
        is_right(mistaken, 32, sizes, seed, number) for sizes in HARD for seed in SEEDS
    )


def test_zeros_that_let_lanes_drift_apart_are_refused() -> None:
    weight = matrix(16, 1024, 0.0)
    weight[1] = 0
    with pytest.raises(TooUnequalError, match="ring of 32 rows is too short"):
        encode(weight, 1, 32)

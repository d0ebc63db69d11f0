"""Does a product from planes of bytes pay on this GPU, and is it right?

    python -m bench.gpu.planes.measure [--json FILE] [--small] [--few]

Compiles planes.cu by nvcc, with a short and a long ring, compares it with a product in
float64, and times one matrix of 16384 x 4096 for 8 and 16 tokens in a CUDA graph beside
cuBLAS on the same matrix dense: each of four copies in turn, so that none stays in the
cache. Above 1, planes are faster. Laying out the tokens is not counted. --few checks
and times nothing. Without CUDA in torch the source is compiled for the CPU.
"""

import ctypes
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bench.gpu.common import DEVICE, ROUNDS, arguments, save, seconds
from bench.gpu.planes import emulate
from bench.gpu.planes.layout import (
    UNIT,
    Planes,
    TooUnequalError,
    encode,
    fragments,
)

RINGS = {32: 8, 64: 4}
"""Rows of a ring, and parts of the columns that lanes do not drift out of it in."""
CHECKED = ((144, 512, 1, 0.5), (32, 1024, 2, 0.65), (16, 512, 1, 0.0))
"""Rows, columns, segments, zeros."""
TIMED = (16384, 4096)
COPIES = 4
MOST_APART = 1e-5


def compiled(folder: Path, ring: int) -> ctypes.CDLL:
    """For the GPU that is here."""
    if torch.version.cuda is None:
        return emulate.compiled(folder, ring)
    major, minor = torch.cuda.get_device_capability()
    library = folder / f"planes{ring}.so"
    how = ["-shared", "-Xcompiler", "-fPIC", "-O3", "-std=c++17"]
    how += [f"-arch=sm_{major}{minor}", f"-DRING_ROWS={ring}", "-o", str(library)]
    subprocess.run(["nvcc", *how, Path(__file__).with_name("planes.cu")], check=True)
    return ctypes.CDLL(str(library))


def shared_bytes(ring: int) -> int:
    """What a block of planes.cu takes at most here."""
    tokens = max(
        TIMED[1] // RINGS[ring], *(cols // parts for _, cols, parts, _ in CHECKED)
    )
    return 128 + tokens // 16 * 2 * 256 + 8 * (ring + UNIT) * 256


def on_device(part: npt.NDArray[Any]) -> Tensor:
    """Its bytes."""
    return torch.from_numpy(part.reshape(-1).view(np.uint8)).to(DEVICE)


def call_of(
    library: ctypes.CDLL, planes: Planes, x_TK: Tensor
) -> tuple[Callable[[], None], Tensor]:
    """The product, and where it comes: [N, T] float32."""
    bits = x_TK.cpu().view(torch.int16).numpy().view(np.uint16)
    tiles = len(bits) // 8
    parts = [on_device(part) for part in (*planes[:4], fragments(bits, tiles))]
    sums = torch.zeros(planes.rows, len(bits), device=DEVICE)

    def call() -> None:
        sums.zero_()
        pointers = [ctypes.c_void_p(part.data_ptr()) for part in (*parts, sums)]
        last = [0, emulate.NONE]
        if torch.version.cuda is not None:
            last = [ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)]
        if error := library.run(tiles, *pointers, *planes.sizes, *last):
            raise RuntimeError(f"CUDA error {error}")

    return call, sums


def random(shape: tuple[int, int], zeros: float, seed: int) -> Tensor:
    """bf16, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(shape, generator=generator)
    made.masked_fill_(torch.rand(shape, generator=generator) < zeros, 0.0)
    return made.bfloat16()


def planes_of(weight_NK: Tensor, segments: int, ring: int) -> Planes:
    """Of a bf16 matrix on the CPU."""
    bits = weight_NK.view(torch.int16).numpy().view(np.uint16)
    return encode(bits, segments, ring)


def check(library: ctypes.CDLL, ring: int) -> None:
    """Compare with float64.

    Raises:
        SystemExit: It is wrong.
    """
    for rows, cols, segments, zeros in CHECKED:
        for tokens in (8, 16):
            weight, x = random((rows, cols), zeros, 0), random((tokens, cols), 0.0, 1)
            call, sums = call_of(library, planes_of(weight, segments, ring), x)
            call()
            wanted = weight.double() @ x.double().T
            error = float((sums.cpu() - wanted).abs().max() / wanted.abs().max())
            if not error <= MOST_APART:
                raise SystemExit(f"{rows} x {cols}, ring {ring}: off by {error:.2g}")


def timed(
    library: ctypes.CDLL, ring: int, zeros: float, tokens: int
) -> dict[str, object]:
    """Microseconds of planes and of cuBLAS."""
    rows, cols = TIMED
    weight, x = random((rows, cols), zeros, 2), random((tokens, cols), 0.0, 3)
    try:
        planes = planes_of(weight, RINGS[ring], ring)
    except TooUnequalError as error:
        return {"left_out": str(error)}
    calls = [call_of(library, planes, x)[0] for _ in range(COPIES)]
    dense, x_there = [weight.to(DEVICE) for _ in range(COPIES)], x.to(DEVICE)
    ours = seconds(calls, ROUNDS)
    theirs = seconds([partial(torch.matmul, x_there, one.T) for one in dense], ROUNDS)
    return {
        "us": round(1e6 * ours, 2),
        "dense_us": round(1e6 * theirs, 2),
        "ratio": round(theirs / ours, 3),
        "bytes_of_dense": round(planes.nbytes / weight.nbytes, 3),
    }


def main() -> None:
    """Check first, then time."""
    parser = arguments(__doc__)
    parser.add_argument("--few", action="store_true", help="check only")
    options = parser.parse_args()
    found: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        for ring in RINGS:
            most = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
            if (needed := shared_bytes(ring)) > most:
                said = f"{needed} bytes of shared memory needed, {most} there"
                found.append({"ring": ring, "left_out": said})
                save(options.json, found)
                continue
            library = compiled(Path(folder), ring)
            check(library, ring)
            found.append({"ring": ring, "right": True})
            save(options.json, found)
            if options.few or options.small:
                continue
            for zeros in (0.5, 0.65):
                for tokens in (8, 16):
                    about = {"ring": ring, "zeros": zeros, "tokens": tokens}
                    found.append(about | timed(library, ring, zeros, tokens))
                    print(found[-1], flush=True)
                    save(options.json, found)
    print(found)


if __name__ == "__main__":
    main()

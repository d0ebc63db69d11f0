"""What this GPU can do at best: memory, products, launches, copies from the host.

python -m bench.gpu.ceilings [--json FILE] [--small]
"""

import time
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.gpu.common import DEVICE, ROUNDS, Call, arguments, save, seconds

SIZE = 2048
"""Elements that a program reads at a time."""


@triton.jit
def read_kernel(words, sums, each, SIZE: tl.constexpr):
    """Sum ``each`` words, so that nothing but reading costs time."""
    total = tl.zeros((SIZE,), tl.int32)
    first = tl.program_id(0).to(tl.int64) * each
    for at in range(0, each, SIZE):
        total += tl.load(words + first + at + tl.arange(0, SIZE))
    tl.store(sums + tl.program_id(0), tl.sum(total))


def reading(words: Tensor, programs: int) -> None:
    """Read everything once."""
    sums = torch.empty(programs, dtype=torch.int32, device=DEVICE)
    read_kernel[(programs,)](words, sums, words.numel() // programs, SIZE=SIZE)


def rates(small: bool) -> Iterator[tuple[str, float]]:
    """Each with its unit in the name."""
    size, side, rounds = (1 << 15, 64, 0) if small else (1 << 32, 8192, ROUNDS)

    def of(*calls: Call) -> float:
        return seconds(calls, rounds)

    words = torch.ones(size // 4, dtype=torch.int32, device=DEVICE)
    programs = min(4096, words.numel() // SIZE)
    yield "read_gb_s", size / of(lambda: reading(words, programs)) / 1e9
    into = torch.empty_like(words)
    yield "copy_gb_s", 2 * size / of(lambda: into.copy_(words)) / 1e9
    yield "write_gb_s", size / of(into.zero_) / 1e9
    one = torch.randn(side, side, device=DEVICE).bfloat16()
    taken = of(lambda: one @ one)
    yield "bf16_tflops", 2 * side**3 / taken / 1e12
    little = torch.zeros(32, device=DEVICE)
    yield "launch_us", 1e6 * of(*[little.zero_] * 64)
    host = torch.zeros(size // 64, dtype=torch.int32)
    target = words[: host.numel()]
    pinned = host.pin_memory()
    yield "host_gb_s", host.nbytes / copying(target, host) / 1e9
    yield "pinned_host_gb_s", host.nbytes / copying(target, pinned) / 1e9


def copying(target: Tensor, source: Tensor) -> float:
    """Seconds of a copy from the host, the fastest of some."""
    taken = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return min(taken)


def main() -> None:
    """Print and save each as it is known."""
    options = arguments(__doc__).parse_args()
    found = {}
    for name, value in rates(options.small):
        found[name] = round(value, 2)
        print(f"{name:20} {value:12.2f}", flush=True)
        save(options.json, found)


if __name__ == "__main__":
    main()

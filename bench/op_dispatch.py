"""Dispatch of a custom op: ``torch.library``'s ``Library`` beside ``custom_op``.

    python bench/op_dispatch.py [--calls 3000] [--rounds 9]

The schema of ``sparse_moe`` with an empty body, in turns; microseconds per call.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.library import Library

SCHEMA = (
    "(Tensor x, Tensor weights, Tensor ids, Tensor? expert_map, Tensor masks, "
    "Tensor starts, Tensor values, Tensor? scales, Tensor masks2, Tensor starts2, "
    "Tensor values2, Tensor? scales2, int width) -> Tensor"
)


def body(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    masks: torch.Tensor,
    starts: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor | None,
    masks2: torch.Tensor,
    starts2: torch.Tensor,
    values2: torch.Tensor,
    scales2: torch.Tensor | None,
    width: int,
) -> torch.Tensor:
    """Nothing but the output."""
    return torch.empty_like(x)


def main() -> None:
    """Both ways in turns; the median and the least of the rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    library = Library("moe_prune_bench", "DEF")
    library.define(f"low{SCHEMA}")
    torch.library.impl("moe_prune_bench::low", "CPU", body, lib=library)
    torch.library.custom_op(
        "moe_prune_bench::high", body, mutates_args=(), schema=SCHEMA
    )
    ops = torch.ops.moe_prune_bench
    ways: dict[str, Callable[..., Any]] = {
        "Library": ops.low.default,
        "custom_op": ops.high.default,
    }
    one = torch.zeros(4)
    half = (one, one, one, None)
    arguments = (*half, *half, *half, 4)
    found: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        for _ in range(options.rounds + 1):
            for name, op in ways.items():
                began = time.perf_counter()
                for _ in range(options.calls):
                    op(*arguments)
                found[name].append((time.perf_counter() - began) / options.calls * 1e6)
    for name, times in found.items():
        kept = times[1:]  # the first round warms up
        print(f"{name}: {statistics.median(kept):.1f} us, least {min(kept):.1f}")


if __name__ == "__main__":
    main()

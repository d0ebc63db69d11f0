"""What the steps of the GPU check share: arguments, layers, times under CUDA graphs.

T tokens, K slots of a token, D hidden, F width, E experts.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.shapes import DEEPSEEK_V2_LITE, MIXTRAL, Shape
from vllm_moe_prune.kernels import blocks
from vllm_moe_prune.kernels.blocks import Blocks

DEVICE = torch.device("cuda")
Call = Callable[[], object]
ROUNDS, UNCOUNTED = 15, 3


SHAPES = {
    "mixtral": MIXTRAL,
    "deepseek-v2-lite": DEEPSEEK_V2_LITE,
    "arctic": Shape(7168, 4864, 32, 2),  # of 128 experts: a fourth
}
SMALL = {"small": Shape(32, 32, 2, 1)}


@dataclass(frozen=True)
class Layer:
    """The same weights, compressed and dense."""

    w13: Blocks
    w2: Blocks
    gate_up_EFD: Tensor
    down_EDF: Tensor


def arguments(description: str | None) -> argparse.ArgumentParser:
    """What every step can be asked for."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try it")
    parser.add_argument("--seconds", type=float, default=3600, help="to end within")
    return parser


def save(path: Path | None, found: object) -> None:
    """What has been measured so far; a run may be cut short."""
    if path is not None:
        path.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def seconds(calls: Sequence[Call], rounds: int = ROUNDS) -> float:
    """Of one call, when a CUDA graph does all of them: the median round's mean.

    Args:
        calls: What alternates.
        rounds: How many count, after some that do not; 0: one, to try it.
    """
    # Compiles, and takes what memory it needs, before anything is captured.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    taken = []
    uncounted = UNCOUNTED if rounds else 0
    for _ in range(uncounted + max(1, rounds)):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(taken[uncounted:])


def matrix(rows: int, cols: int, zeros: str) -> Tensor:
    """Random bf16 weights on the device; zeros is a share, or 2:4."""
    made = torch.randn(rows, cols, device=DEVICE).mul_(cols**-0.5)
    if zeros == "2:4":
        order = torch.rand(rows, cols // 4, 4, device=DEVICE).argsort(dim=-1)
        made.masked_fill_((order >= 2).view(rows, cols), 0)
    else:
        made.masked_fill_(torch.rand(rows, cols, device=DEVICE) < float(zeros), 0)
    return made.bfloat16()


def layer(shape: Shape, zeros: str) -> Layer:
    """A layer of random weights."""
    size = (shape.experts, 2 * shape.width, shape.hidden)
    gate_up = torch.empty(size, dtype=torch.bfloat16, device=DEVICE)
    size = (shape.experts, shape.hidden, shape.width)
    down = torch.empty(size, dtype=torch.bfloat16, device=DEVICE)
    ups, downs = [], []
    for expert in range(shape.experts):
        gate_up[expert] = matrix(2 * shape.width, shape.hidden, zeros)
        down[expert] = matrix(shape.hidden, shape.width, zeros)
        ups.append(blocks.encode(gate_up[expert].chunk(2)))
        downs.append(blocks.encode([down[expert]]))
    return Layer(blocks.join(ups), blocks.join(downs), gate_up, down)


def bytes_of(shape: Shape) -> int:
    """What a dense layer takes."""
    return 6 * shape.experts * shape.hidden * shape.width


def random_ids(shape: Shape, tokens: int) -> Tensor:
    """Experts of each token, int32 [T, K]."""
    scores = torch.rand(tokens, shape.experts, device=DEVICE)
    return scores.topk(shape.top_k).indices.to(torch.int32)

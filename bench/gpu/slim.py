"""How long does every method take for one expert on this GPU?

    python -m bench.gpu.slim [--json FILE] [--small] [--seconds S]

Seconds for gate, up and down of one expert, with what the method needs to know of its
inputs already there but for SparseGPT's and GPTQ's factors; the second of two runs.
"""

import importlib.util
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bench.gpu.common import DEVICE, SHAPES, SMALL, Shape, arguments, matrix, save
from vllm_moe_prune.kernels import blocks
from vllm_moe_prune.slim.kurtosis import power_sums
from vllm_moe_prune.slim.magnitude import magnitude
from vllm_moe_prune.slim.sparsegpt import add_inputs, sparsegpt
from vllm_moe_prune.slim.wanda import wanda
from vllm_moe_prune.slim.wanda_variant import wanda_variant

TOKENS, SAMPLED_TOKENS = 4096, 512
Method = Callable[["Given"], object]


class Given(NamedTuple):
    """A matrix and what is known of its inputs."""

    weight_RD: Tensor
    squares_D: Tensor
    hessian_DD: Tensor
    x_nD: Tensor
    """As many as AWQ looks at."""


METHODS: dict[str, Method] = {
    "wanda": lambda of: wanda(of.weight_RD, of.squares_D, 0.5),
    "wanda 2:4": lambda of: wanda(of.weight_RD, of.squares_D, 0.5, 4),
    "wanda-variant": lambda of: wanda_variant(of.weight_RD, of.squares_D, 0.5),
    "magnitude": lambda of: magnitude(of.weight_RD, 0.5),
    "sparsegpt": lambda of: sparsegpt(of.weight_RD, of.hessian_DD, 0.5),
    "sparsegpt 2:4": lambda of: sparsegpt(of.weight_RD, of.hessian_DD, 0.5, 4),
    "kurtosis": lambda of: power_sums(of.weight_RD.flatten()),
    "compressing": lambda of: blocks.encode([of.weight_RD]),
}


def quantizing() -> dict[str, Method]:
    """Methods that need compressed-tensors; nothing where it is not installed."""
    if importlib.util.find_spec("compressed_tensors") is None:
        return {}
    from vllm_moe_prune.kernels.quantized import Form
    from vllm_moe_prune.slim.awq import candidates, errors
    from vllm_moe_prune.slim.gptq import gptq
    from vllm_moe_prune.slim.rtn import rtn

    form = Form("int4", 32)

    def awq(of: Given) -> object:
        scales = candidates(of.x_nD.abs().mean(0))
        return errors(of.weight_RD, of.x_nD, scales, form)

    return {
        "gptq": lambda of: gptq(of.weight_RD, of.hessian_DD, form),
        "rtn": lambda of: rtn(of.weight_RD, form),
        "awq": awq,
    }


def expert(shape: Shape, tokens: int) -> list[Given]:
    """Gate, up and down, with the sums of their inputs."""
    known = []
    for cols in (shape.hidden, shape.width):
        x_nD = torch.randn(tokens, cols, device=DEVICE)
        hessian_DD = torch.zeros(cols, cols, device=DEVICE)
        add_inputs(hessian_DD, x_nD)
        squares_D = x_nD.square().sum(0, dtype=torch.float64)
        known.append((squares_D, hessian_DD, x_nD[:SAMPLED_TOKENS]))
    gate, up = (matrix(shape.width, shape.hidden, "0") for _ in range(2))
    down = matrix(shape.hidden, shape.width, "0")
    return [Given(gate, *known[0]), Given(up, *known[0]), Given(down, *known[1])]


def timed(method: Method, matrices: Sequence[Given]) -> float:
    """Seconds of all of an expert's matrices."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for given in matrices:
        method(given)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """One row for each shape and method."""
    options = arguments(__doc__).parse_args()
    began = time.monotonic()
    methods = METHODS | quantizing()
    found: list[dict[str, object]] = []
    for name, shape in (SMALL if options.small else SHAPES).items():
        matrices = expert(shape, 64 if options.small else TOKENS)
        for kind, method in methods.items():
            about: dict[str, object] = {"shape": name, "method": kind}
            if time.monotonic() - began > options.seconds:
                found.append({**about, "left_out": "no time left"})
            else:
                if not options.small:
                    timed(method, matrices)
                found.append({**about, "seconds": round(timed(method, matrices), 4)})
            print(found[-1], flush=True)
            save(options.json, found)


if __name__ == "__main__":
    main()

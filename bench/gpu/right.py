"""Are the kernels right on this GPU? Against their definition in torch, on the CPU.

    python -m bench.gpu.right [--json FILE] [--few] [--small]

Expansion bit for bit; products within a few units of the last place, the same bits each
time, and the same from a CUDA graph whose routing has changed since. Ends with 1 if
anything is wrong. --few is enough for compute-sanitizer.
"""

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.gpu.common import DEVICE, arguments, save
from vllm_moe_prune.kernels import blocks
from vllm_moe_prune.kernels.blocks import BITS, FP8, Blocks
from vllm_moe_prune.kernels.triton.expand import expand
from vllm_moe_prune.kernels.triton.fused import fused_moe

TYPES = (torch.bfloat16, torch.float16, torch.float32)
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
"""Largest error over the largest output."""


@dataclass(frozen=True)
class Case:
    """One layer and some tokens for it."""

    hidden: int
    width: int
    zeros: tuple[float, ...]
    """Of each expert."""
    tokens: int
    top_k: int
    dtype: torch.dtype
    fp8: bool
    mapped: bool
    """Whether half of the experts are elsewhere."""


def cases(few: bool, small: bool) -> Iterator[Case]:
    """Odd sizes, empty and full experts, one token to several groups of an expert."""
    mixed = (0.0, 0.5, 0.65, 1.0)
    if few or small:
        for fp8 in (False, True):
            yield Case(40, 20, (0.5, 1.0), 3, 2, torch.bfloat16, fp8, True)
        return
    sizes = ((1, 1), (70, 37), (512, 320), (1024, 96))
    for (hidden, width), dtype, fp8, mapped in itertools.product(
        sizes, TYPES, (False, True), (False, True)
    ):
        for tokens, top_k in ((1, 1), (5, 2), (70, 3)):
            yield Case(hidden, width, mixed, tokens, top_k, dtype, fp8, mapped)
    for tokens in (1, 16, 64):
        yield Case(4096, 1024, (0.5,) * 4, tokens, 2, torch.bfloat16, False, False)
        yield Case(2048, 1408, (0.65,) * 16, tokens, 6, torch.bfloat16, False, False)


def weights(
    case: Case, shape: tuple[int, int], sources: int, generator: torch.Generator
) -> Blocks:
    """One kind of matrix of all experts, on the CPU."""
    made = []
    stored, scale = FP8 if case.fp8 else case.dtype, shape[1] ** -0.5
    for zeros in case.zeros:
        each = [torch.randn(shape, generator=generator) for _ in range(sources)]
        for one in each:
            # Not a product: -0.0 is stored like any other value.
            one.masked_fill_(torch.rand(shape, generator=generator) < zeros, 0.0)
        scales = None
        if case.fp8:
            tiles = (-(-shape[0] // 16), -(-shape[1] // 32))
            scales = [scale * (torch.rand(tiles, generator=generator) + 0.5)] * sources
        else:
            each = [scale * one for one in each]
        made.append(blocks.encode([one.to(stored) for one in each], scales))
    return blocks.join(made)


def expansion(w: Blocks, case: Case, shape: tuple[int, int], sources: int) -> str:
    """What is wrong with expanding every second expert; nothing if it is right."""
    used = [int(expert % 2 == 0) for expert in range(len(case.zeros))]
    found = torch.full(
        (len(used), sources * shape[0], shape[1]), 7.0, dtype=case.dtype, device=DEVICE
    )
    given = torch.tensor(used, dtype=torch.int32, device=DEVICE)
    expand(w.to(DEVICE), given, sources, found)
    host, bits = found.cpu(), BITS[case.dtype.itemsize]
    for expert, wanted in enumerate(used):
        expected = torch.full_like(host[expert], 7.0)
        if wanted:
            expected = torch.cat(blocks.decode(w, expert, sources, shape, case.dtype))
        if not torch.equal(host[expert].view(bits), expected.view(bits)):
            return f"expansion of expert {expert} differs"
    return ""


def apart(found: Tensor, wanted: Tensor) -> float:
    """Largest error over the largest output; more than any tolerance if not finite."""
    error = (found.float() - wanted.float()).abs().max() / max(
        0.5, float(wanted.float().abs().max())
    )
    return float(error) if bool(torch.isfinite(error)) else 1e9


def routing(case: Case, generator: torch.Generator) -> Tensor:
    """Ids with slots of nobody among them, int32 [T, K]."""
    experts = len(case.zeros) * (2 if case.mapped else 1)
    size = (case.tokens, case.top_k)
    return torch.randint(-1, experts, size, generator=generator, dtype=torch.int32)


def products(w13: Blocks, w2: Blocks, case: Case, generator: torch.Generator) -> str:
    """What is wrong with the fused kernel."""
    expert_map = None
    if case.mapped:
        here = len(case.zeros)
        expert_map = torch.full((2 * here,), -1, dtype=torch.int32)
        expert_map[::2] = torch.arange(here, dtype=torch.int32)
    ids = [routing(case, generator) for _ in range(2)]
    x_TD = torch.randn(case.tokens, case.hidden, generator=generator).to(case.dtype)
    weights_TK = torch.rand(ids[0].shape, generator=generator)
    wanted = [
        blocks.fused_moe(x_TD, weights_TK, one, expert_map, w13, w2, case.width)
        for one in ids
    ]
    static_ids = ids[0].to(DEVICE)
    given = (x_TD.to(DEVICE), weights_TK.to(DEVICE), static_ids)
    place = None if expert_map is None else expert_map.to(DEVICE)
    rest = (place, w13.to(DEVICE), w2.to(DEVICE), case.width)
    first, again = fused_moe(*given, *rest), fused_moe(*given, *rest)
    if not torch.equal(first, again):
        return "the fused kernel gives other bits the second time"
    if (error := apart(first.cpu(), wanted[0])) > TOLERANCE[case.dtype]:
        return f"the fused kernel is off by {error:.2g}"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = fused_moe(*given, *rest)
    static_ids.copy_(ids[1])
    graph.replay()
    if (error := apart(replayed.cpu(), wanted[1])) > TOLERANCE[case.dtype]:
        return f"the fused kernel in a CUDA graph is off by {error:.2g}"
    return ""


def problem(case: Case) -> str:
    """The first thing that is wrong with a case."""
    generator = torch.Generator().manual_seed(1)
    up, down = (case.width, case.hidden), (case.hidden, case.width)
    w13 = weights(case, up, 2, generator)
    w2 = weights(case, down, 1, generator)
    return (
        expansion(w13, case, up, 2)
        or expansion(w2, case, down, 1)
        or products(w13, w2, case, generator)
    )


def main() -> None:
    """Check every case, and count."""
    parser = arguments(__doc__)
    parser.add_argument("--few", action="store_true", help="two cases")
    options = parser.parse_args()
    checked, wrong = 0, []
    for case in cases(options.few, options.small):
        if said := problem(case):
            wrong.append({"case": repr(case), "problem": said})
            print(f"{case}: {said}", flush=True)
        checked += 1
        save(options.json, {"checked": checked, "wrong": wrong})
    print(f"{checked} cases, {len(wrong)} wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()

"""Up to how many slots experts are multiplied as they are stored, measured here.

Expansion writes dense weights and reads them again, which pays once many slots share
them. When the first layer of some sizes runs, both ways are measured on it, and one
line of the log says what was found. T tokens, K slots of a token, E experts.
"""

import logging
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..blocks import Blocks
from .expand import expand_layer
from .fused import GROUP, fused_moe

log = logging.getLogger(__name__)

Dense = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""x_TD, weights_TK, ids_TK, gate above up [E, 2F, D], down [E, D, F] -> [T, D]."""
ROUNDS = 5
_PER_EXPERT: dict[tuple[object, ...], float] = {}
"""The most slots by expert, of layers of some sizes on some device."""


class Times(NamedTuple):
    """Milliseconds for so many slots."""

    slots: int
    fused: float
    expanded: float
    dense: float
    """Of weights that were expanded before: what a dense layer would take."""


def most_fused(times: Sequence[Times]) -> int:
    """The most slots up to which the fused kernel was never the slower one."""
    most = 0
    for each in times:
        if each.fused > each.expanded:
            break
        most = each.slots
    return most


def slots_per_expert(
    x_TD: Tensor, top_k: int, w13: Blocks, w2: Blocks, width: int, dense: Dense
) -> float:
    """The most slots that are fused, by expert: measured the first time, then known.

    While a CUDA graph is captured nothing can be measured: until then it is ``GROUP``,
    up to which weights are read once.
    """
    experts, hidden = len(w13.masks_EBS), x_TD.shape[1]
    scaled = w13.scales_EBC is not None
    key = (x_TD.device, x_TD.dtype, hidden, width, top_k, scaled)
    if key not in _PER_EXPERT:
        if torch.cuda.is_current_stream_capturing():
            return float(GROUP)
        times = measured(x_TD, top_k, w13, w2, width, dense)
        most = most_fused(times)
        _PER_EXPERT[key] = most / experts
        log.info("%s", said(times, most, f"{experts} of {hidden} x {width}"))
    return _PER_EXPERT[key]


def said(times: Sequence[Times], most: int, sizes: str) -> str:
    """One line on what was chosen, and whether dense experts would be faster."""
    one = times[0]
    chosen = f"multiplied as stored for up to {most} slots, expanded for more"
    advice = ""
    if one.dense < min(one.fused, one.expanded):
        advice = (
            ". Dense is faster where it fits: `vllm-moe-prune convert --storage dense`"
        )
    return (
        f"moe_prune: compressed experts ({sizes}) are "
        f"{chosen if most else 'always expanded'}: {one.slots} slots take "
        f"{one.fused:.3f} ms as stored, {one.expanded:.3f} ms expanded, "
        f"{one.dense:.3f} ms if dense{advice}"
    )


def measured(
    x_TD: Tensor, top_k: int, w13: Blocks, w2: Blocks, width: int, dense: Dense
) -> list[Times]:
    """All ways on a layer, for one token and more, up to two groups an expert."""
    experts, hidden = len(w13.masks_EBS), x_TD.shape[1]

    def times(tokens: int) -> Times:
        x = torch.ones(tokens, hidden, dtype=x_TD.dtype, device=x_TD.device)
        weights_TK = torch.ones(tokens, top_k, device=x_TD.device)
        # Every expert in turn: as many as so many slots can choose.
        slots_S = torch.arange(tokens * top_k, device=x_TD.device)
        ids_TK = slots_S.remainder(experts).view(tokens, top_k).to(torch.int32)
        routed = (x, weights_TK, ids_TK)
        expand = partial(expand_layer, x, ids_TK.long(), w13, w2, width)
        held = expand()
        return Times(
            ids_TK.numel(),
            _milliseconds(partial(fused_moe, *routed, None, w13, w2, width)),
            _milliseconds(lambda: dense(*routed, *expand())),
            _milliseconds(lambda: dense(*routed, *held)),
        )

    most = max(1, 2 * GROUP * experts // top_k)
    return [times(2**power) for power in range(most.bit_length())]


def _milliseconds(call: Callable[[], object]) -> float:
    """The median of some calls, after one that compiles."""
    call()
    taken = []
    for _ in range(ROUNDS):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        taken.append(float(start.elapsed_time(end)))
    return statistics.median(taken)

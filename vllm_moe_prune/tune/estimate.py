"""What a search has to compute and read at least, and how long that takes here."""

import math
import time
from dataclasses import dataclass

import torch

from ..calibrate.forward import StreamingModel
from ..checkpoint.open import Checkpoint
from ..decide.required_stats import needed_statistics
from ..decide.sensitivity import rule
from ..recipes.schema import Recipe, TuneStage
from ..stages.probe import POINTS
from .candidates import structures
from .judged import FIRST, better_half
from .recommend import CONTEXT, attention_flops, costs_as_is
from .sizes import Size, sized

PROBE_TOKENS = 256
OVERHEAD = 1.7
"""How many times the floor a search takes, by the run in docs/results/tune.md."""


@dataclass(frozen=True)
class Estimate:
    """The forwards that a search needs."""

    candidates: int
    flops: float
    """Of the forwards alone: nothing for ranking weights and writing zeros."""
    bytes_read: float
    flops_per_second: float
    """Of products as wide as the model's experts, on all cores."""

    @property
    def floor_s(self) -> float:
        """Seconds of the forwards at the speed of plain products."""
        return self.flops / self.flops_per_second

    @property
    def seconds(self) -> float:
        """How long the search is likely to take."""
        return OVERHEAD * self.floor_s


def estimate(
    checkpoint: Checkpoint, recipe: Recipe, sizes: list[Size], device: str = "cpu"
) -> Estimate:
    """Count what ``tune_sizes`` runs through the model; times one product.

    Args:
        checkpoint: The model.
        recipe: With ``tune``.
        sizes: What plans are to come to.
        device: Where the search is to run.
    """
    tune, text = recipe.tune or TuneStage(), recipe.calibration
    calibration = text.samples * text.sequence_length
    heldout = text.heldout * text.sequence_length
    found = structures(sized(recipe, sizes[0]), checkpoint.layers)
    rules = {
        rule(one.recipe)
        for one in found
        if "sensitivity_P2" in needed_statistics(one.recipe)
    }
    layers = max(1, len(checkpoint.decoder_layers))
    count = len(found)
    better = better_half(count, tune.finalists)
    # Every plan runs its held-out tokens; a finalist its calibration tokens too, dense
    # up to what the down projections read, then slimmed.
    each = (
        count * FIRST * heldout
        + better * heldout
        + (tune.finalists + 1) * (1 + len(tune.slims) + tune.owl) * heldout
        + (tune.finalists + 1) * (heldout + 5 / 3 * calibration)
    )
    # A point of a curve costs the layers above the one that it varies.
    curves = len(rules) * POINTS * (layers + 1) / 2 * heldout
    shared = calibration + curves + 3 * FIRST * calibration + heldout
    tokens = shared + len(sizes) * each
    length, decoders = text.sequence_length, checkpoint.decoder_layers
    products = costs_as_is(checkpoint).flops - attention_flops(checkpoint, decoders)
    per_token = products / CONTEXT
    per_token += attention_flops(checkpoint, decoders, length) / length
    return Estimate(
        candidates=count * len(sizes),
        flops=per_token * tokens,
        bytes_read=float(checkpoint.tensor_bytes)
        * (1 + len(rules) + math.ceil(len(sizes) * 3)),
        flops_per_second=_speed(checkpoint, device),
    )


def _speed(checkpoint: Checkpoint, device: str) -> float:
    """FLOPs in a second of an expert's first product, for some tokens."""
    model = StreamingModel(checkpoint, device)
    width = max(layer.width for layer in checkpoint.layers)
    hidden = int(checkpoint.config[checkpoint.arch.config.hidden])
    x_ND = torch.ones(PROBE_TOKENS, hidden, dtype=model.dtype, device=model.device)
    weight_FD = torch.ones(width, hidden, dtype=model.dtype, device=model.device)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        (x_ND @ weight_FD.T)[0, 0].item()
        times.append(time.perf_counter() - began)
    # The first ones compile; the fastest is least disturbed.
    return 2 * x_ND.numel() * width / min(times)

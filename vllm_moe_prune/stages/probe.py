"""Measuring that has to try decisions out: sensitivity per layer, outliers per expert.

Both follow ``measure``: they read what it found, and add to it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from .. import __version__
from ..calibrate.data import Tokens
from ..calibrate.forward import StreamingModel
from ..calibrate.stats import LayerStats, SourceStats, Stats
from ..checkpoint.open import Checkpoint
from ..cut.losses import LossJournal, Text
from ..cut.outliers import with_outliers
from ..cut.predict import model_facts
from ..cut.quick import quick_losses
from ..decide.budget import most_removed
from ..decide.build_plan import resolved
from ..decide.cut_plan import CutPlan, LayerPlan
from ..decide.experts import decide_experts, remove_counts
from ..decide.facts import ModelFacts
from ..decide.sensitivity import rule
from ..decide.share import ZEROS
from ..decide.super_experts import protecting
from ..decide.zeros import plan_routing
from ..errors import CheckpointError
from ..progress import Report, ignore
from ..recipes.schema import Recipe

POINTS = 4
"""Counts of removed experts at which a layer's curve is measured, besides 0."""
WORST = 1e3
"""In nats: a point of infinite loss is never worth it; any finite number says so."""


def judging_model(checkpoint: Checkpoint, device: str) -> StreamingModel:
    """The input, to compare plans by: in float32 on CPUs.

    Most of them multiply bf16 at half its speed or less.
    """
    dtype = torch.float32 if torch.device(device).type == "cpu" else None
    return StreamingModel(checkpoint, device, dtype)


def with_sensitivity(
    model: StreamingModel,
    recipe: Recipe,
    stats: Stats,
    heldout: Tokens,
    journal: LossJournal | None = None,
    report: Report = ignore,
    *,
    zeros_on: Tokens | None = None,
) -> Stats:
    """Add each layer's curve: held-out loss against experts removed from it alone.

    Each named source of the held-out text gets curves of its own too. One sweep over
    the weights judges all points; each costs the layers above its own.

    Args:
        model: The input.
        recipe: Says by which rule experts leave.
        stats: What that rule reads.
        heldout: Tokens that calibrate nothing.
        journal: Losses known from an interrupted run.
        report: Called after every layer.
        zeros_on: What to calibrate zeros on, whose cost is then measured too.

    Raises:
        CheckpointError: The intact model's loss is not finite.
    """
    facts = model_facts(model.checkpoint)
    recipe = protecting(recipe, stats, facts.layers)
    intact = _dry(facts, recipe, remove_counts(stats, facts.layers, recipe, {}))
    removals = {
        layer.layer: _points(most_removed(layer.layer, shape, recipe.experts))
        for layer, shape in zip(intact.layers, facts.layers, strict=True)
        if layer.keep
    }
    # The intact model first: its loss is every curve's point at 0.
    plans = [intact]
    for layer, counts in removals.items():
        for count in counts:
            removed = remove_counts(stats, facts.layers, recipe, {layer: count})
            plans.append(_dry(facts, recipe, removed))
    if zeros_on is not None:
        plans += [_zeroed(intact, sparsity) for sparsity in ZEROS]
    names = _named(heldout, stats)
    texts = [Text(heldout.ids_ST)]
    if names:
        texts = [
            Text(heldout.ids_ST[heldout.source_S == at]) for at in range(len(names))
        ]
    found = quick_losses(
        model,
        plans,
        texts,
        zeros_on.ids_ST if zeros_on is not None else None,
        journal=journal,
        report=report,
        stage="sensitivity",
    )
    tokens = sum(loss.tokens for loss in found[0])
    losses = [sum(loss.nll for loss in each) / tokens for each in found]
    if not np.isfinite(losses[0]):
        raise CheckpointError(
            f"{model.checkpoint.folder}: its loss on {heldout.source} is not finite. "
            "The weights are damaged, or the stored dtype overflows on this text."
        )
    of_zeros = losses[len(losses) - len(ZEROS) :] if zeros_on is not None else []
    sources = dict(stats.sources)
    for at, name in enumerate(names):
        part = sources.get(name, SourceStats())
        own = [each[at].mean for each in found]
        sources[name] = replace(part, layers=_with_curves(part.layers, removals, own))
    return replace(
        stats,
        layers=_with_curves(stats.layers, removals, losses),
        sources=sources,
        sensitivity={
            "rule": rule(recipe),
            "heldout": heldout.describe(),
            "tokens": tokens,
            "candidates": len(plans),
            "zeros": [min(one, WORST) - losses[0] for one in of_zeros],
        },
    )


def _named(heldout: Tokens, stats: Stats) -> tuple[str, ...]:
    """The sources that get curves of their own: those that have statistics, or all."""
    known = stats.sources.keys() or {*heldout.names}
    return heldout.names if known == {*heldout.names} else ()


def _with_curves(
    layers: Mapping[int, LayerStats],
    removals: Mapping[int, Sequence[int]],
    losses: Sequence[float],
) -> dict[int, LayerStats]:
    """The statistics with each layer's points: the intact model's loss, then its own.

    Args:
        layers: What is known of them.
        removals: How many experts were removed from each, in the order of ``losses``.
        losses: The intact model's first.
    """
    found = dict(layers)
    rest = iter(losses[1:])
    for layer, counts in removals.items():
        points = [
            (0, min(losses[0], WORST)),
            *((count, min(next(rest), WORST)) for count in counts),
        ]
        # A rule that reads no statistics, such as random, leaves layers without any.
        known = found.get(layer, LayerStats())
        found[layer] = replace(known, sensitivity_P2=np.array(points, np.float64))
    return found


def with_owl(
    model: StreamingModel,
    recipe: Recipe,
    stats: Stats,
    tokens: Tokens,
    report: Report = ignore,
) -> Stats:
    """Add the outliers of the model that the recipe's first stage leaves."""
    facts = model_facts(model.checkpoint)
    complete = resolved(recipe, facts, stats)
    layers, _ = decide_experts(stats, facts.layers, complete)
    return with_outliers(model, _dry(facts, recipe, layers), stats, tokens, report)


def _points(most: int) -> list[int]:
    """At most ``POINTS`` counts up to ``most``, evenly spread, the last included."""
    spread = np.linspace(0, most, min(POINTS, most) + 1)[1:]
    # Rounded up, but not where linspace misses a whole number by rounding.
    return [int(count) for count in np.unique(np.ceil(spread - 1e-9))]


def _zeroed(intact: CutPlan, sparsity: float) -> CutPlan:
    """A plan that removes nothing and zeroes a share of every expert by Wanda."""
    layers = [
        layer.model_copy(update={"sparsity": sparsity if layer.keep else 0.0})
        for layer in intact.layers
    ]
    return intact.model_copy(update={"slim": "wanda", "layers": tuple(layers)})


def _dry(facts: ModelFacts, recipe: Recipe, layers: Sequence[LayerPlan]) -> CutPlan:
    """A plan that removes experts and zeroes nothing."""
    return CutPlan(
        tool_version=__version__,
        model=facts.model,
        recipe=recipe,
        routing=plan_routing(recipe),
        layers=tuple(layers),
    )

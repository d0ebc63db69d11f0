"""Other mixes of the calibration sources, from the statistics kept for each of them.

Statistics are sums, so that those of a mix are weighted sums: no other pass is needed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace

import numpy as np

from ..calibrate.stats import MAXIMA, PER_SOURCE, LayerStats, Stats, together
from ..errors import PlanError
from ..recipes.calibration import Blend
from .cut_plan import CutPlan, LayerPlan
from .similarity import Array

ROUNDS = 16
MEASURE_SOURCES = (
    "Run `vllm-moe-prune measure` with --calibration NAME=FILE for each source."
)
OUTPUT = "weighted_norm_sum_E"
CURVE = "sensitivity_P2"

Shares = dict[str, float]


def decide_blended(
    stats: Stats | None, blend: Blend | None, decide: Callable[[Stats | None], CutPlan]
) -> tuple[CutPlan, Shares]:
    """The plan from statistics of another mix, and each source's share in it.

    Args:
        stats: As they were measured.
        blend: The mix; None leaves it as it is, and then no share is told.
        decide: Makes a plan of statistics.

    Raises:
        PlanError: The statistics have no such sources.
    """
    if blend is None:
        return decide(stats), {}
    if stats is None or not stats.sources:
        raise PlanError(
            f"the statistics tell no sources apart to blend. {MEASURE_SOURCES}"
        )
    if blend == "maxmin":
        return _maxmin(stats, decide)
    if unknown := blend.keys() - stats.sources.keys():
        raise PlanError(
            f"the statistics have no source {', '.join(sorted(unknown))}, but "
            f"{', '.join(stats.sources)}. {MEASURE_SOURCES}"
        )
    if not any(blend.values()):
        raise PlanError("calibration.blend: at least one weight must not be 0.")
    shares = _shares({name: blend.get(name, 0.0) for name in stats.sources})
    return decide(blended(stats, shares)), shares


def blended(stats: Stats, shares: Mapping[str, float]) -> Stats:
    """Statistics as if each source had had its share of all tokens.

    Maxima are those of all sources with a share above 0. What no source has of its own
    stays as it is.

    Args:
        stats: As they were measured.
        shares: Of each source, adding up to 1.
    """
    used = {name: share for name, share in shares.items() if share > 0.0}
    layers = dict(stats.layers)
    for index in layers:
        parts = {name: stats.sources[name].layers.get(index) for name in used}
        known = {name: part for name, part in parts.items() if part is not None}
        if len(known) == len(used):
            layers[index] = _layer(layers[index], known, used)
    cosine_HH, tokens = stats.block_cosine_HH, stats.block_tokens
    if cosine_HH is not None and tokens is not None:
        sums = []
        for name, share in used.items():
            part = stats.sources[name]
            if part.block_cosine_HH is None or part.block_tokens is None:
                raise PlanError(f"source {name} lacks block_cosine_HH. Measure again.")
            sums.append(
                part.block_cosine_HH * share * _times(tokens, part.block_tokens)
            )
        cosine_HH = together("block_cosine_HH", sums)
    return replace(stats, layers=layers, block_cosine_HH=cosine_HH)


def _layer(
    whole: LayerStats, parts: Mapping[str, LayerStats], shares: Mapping[str, float]
) -> LayerStats:
    new: dict[str, Array] = {}
    for item in fields(LayerStats):
        name = item.name
        values = [getattr(part, name) for part in parts.values()]
        if name not in {*PER_SOURCE, CURVE} or values[0] is None:
            continue
        if any(value is None for value in values):
            raise PlanError(f"not every source has {name}. {MEASURE_SOURCES}")
        if name not in MAXIMA:
            # A curve is of losses per token, not of sums over tokens.
            values = [
                value
                * shares[source]
                * (1.0 if name == CURVE else _times(whole.tokens, part.tokens))
                for (source, part), value in zip(parts.items(), values, strict=True)
            ]
        new[name] = together(name, values)
    return replace(whole, **new)


def _times(all_tokens: Array | None, own: Array | None) -> float:
    """What brings a source's sums to the number of all tokens."""
    if all_tokens is None or own is None or float(own) <= 0.0:
        raise PlanError(f"a source lacks its number of tokens. {MEASURE_SOURCES}")
    return float(all_tokens) / float(own)


def coverage(stats: Stats, layers: Sequence[LayerPlan]) -> Shares:
    """How much of what each source's experts gave the kept ones gave.

    Of each layer the share of the kept experts in the sum of norms of outputs times
    router weights, and of those the mean over layers; nothing where it is not known.
    """
    found: Shares = {}
    for name, source in stats.sources.items():
        shares = []
        for plan in layers:
            part = source.layers.get(plan.layer)
            norm_E = None if part is None else getattr(part, OUTPUT)
            if plan.experts and norm_E is not None and (total := norm_E.sum()) > 0:
                shares.append(float(norm_E[list(plan.keep)].sum() / total))
        if shares:
            # Rounding may leave a whole a little above 1.
            found[name] = min(1.0, float(np.mean(shares)))
    return found


def _maxmin(
    stats: Stats, decide: Callable[[Stats | None], CutPlan]
) -> tuple[CutPlan, Shares]:
    """The mix whose plan covers its least covered source best.

    Tried are equal shares, rounds of multiplicative weights from there, which give more
    to sources that are covered less, and each source alone; ties go to the earlier try.
    """
    names = list(stats.sources)
    equal = dict.fromkeys(names, 1.0 / len(names))
    best: tuple[float, CutPlan, Shares] | None = None

    def tried(shares: Shares) -> Shares:
        nonlocal best
        plan = decide(blended(stats, shares))
        found = coverage(stats, plan.layers)
        if found.keys() != stats.sources.keys():
            raise PlanError(
                f"blend maxmin goes by {OUTPUT}, which not every source has. "
                f"{MEASURE_SOURCES}"
            )
        if best is None or min(found.values()) > best[0]:
            best = min(found.values()), plan, shares
        return found

    shares = equal
    for turn in range(ROUNDS):
        found = tried(shares)
        low, high = min(found.values()), max(found.values())
        if high - low < 1e-9:
            break
        step = 1.0 / math.sqrt(turn + 1.0)
        shares = _shares(
            {
                name: shares[name]
                * math.exp(step * (high - found[name]) / (high - low))
                for name in names
            }
        )
    for alone in names:
        tried({name: float(name == alone) for name in names})
    assert best is not None
    return best[1], best[2]


def _shares(weights: Mapping[str, float]) -> Shares:
    total = sum(weights.values())
    return {name: min(1.0, weight / total) for name, weight in weights.items()}

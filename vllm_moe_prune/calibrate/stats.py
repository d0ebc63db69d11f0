"""What is summed about a checkpoint; ``stats_file`` keeps it.

Data-free quantities come from the weights; the others are sums over calibration
tokens in float64, so that parts measured on different machines can be added.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import reduce
from typing import Any

import numpy as np

from ..checkpoint.layer_hashes import WeightHashes
from ..errors import PlanError
from .stats_ranges import Array as Array


@dataclass(frozen=True, kw_only=True)
class LayerStats:
    """Statistics of one MoE layer; E experts. Absent ones were not measured.

    "Score" is what the router ranks experts by before top-k (the full softmax),
    "weight" what an expert's output is multiplied with (renormalized if the family
    does so); c_i(t) = weight x output of expert i for token t, 0 if not chosen.
    """

    router_sqdist_EE: Array | None = None
    """Squared L2 distance between router rows."""
    router_norm: Array | None = None
    """Frobenius norm of the whole router, shape []."""
    router_row_norm_E: Array | None = None
    """L2 norm of each router row."""
    weight_sqdist_EE: Array | None = None
    """Squared L2 distance between experts, all their matrices concatenated."""
    weight_powers_E5: Array | None = None
    """Sums of w^0 to w^4 over each expert's non-zero weights (``slim/kurtosis.py``)."""
    tokens: Array | None = None
    """Calibration tokens seen by the layer, shape []."""
    routed_E: Array | None = None
    """Tokens routed to each expert."""
    coactivation_EE: Array | None = None
    """Tokens that were routed to both experts; symmetric, zero diagonal."""
    score_full_sum_E: Array | None = None
    """Sum of scores over all tokens."""
    score_selected_sum_E: Array | None = None
    """Sum of scores over the tokens that chose the expert; not renormalized."""
    weighted_norm_sum_E: Array | None = None
    """Sum over tokens of ||c_i(t)||."""
    weighted_sqnorm_sum_E: Array | None = None
    """Sum over tokens of ||c_i(t)||^2."""
    activation_norm_sum_E: Array | None = None
    """Sum over the expert's own tokens of ||E_i(x)||, without the router's weight."""
    activation_sqnorm_sum_E: Array | None = None
    """Sum over the expert's own tokens of ||E_i(x)||^2."""
    activation_max_E: Array | None = None
    """Largest magnitude in what the down projection gave for the expert's tokens."""
    contribution_gram_EE: Array | None = None
    """Sum over tokens of <c_i(t), c_j(t)>, perhaps over a part of the tokens only."""
    output_sqdist_EE: Array | None = None
    """Sum over sampled tokens of ||E_i(x) - E_j(x)||^2, whoever was chosen."""
    output_sqnorm_E: Array | None = None
    """Sum over the same tokens of ||E_i(x)||^2."""
    output_sum_ED: Array | None = None
    """Sum over the expert's own tokens of E_i(x), of all sources together; D hidden."""
    moe_cosine_sum: Array | None = None
    """Sum over tokens of cos(x', x' + MoE(Norm(x'))), shape [] (Eq. 9)."""
    moe_only_cosine_sum: Array | None = None
    """Sum over tokens of cos(Norm(x'), MoE(Norm(x'))), shape [] (Eq. 8)."""
    owl_outliers_E: Array | None = None
    """Weights of each expert whose Wanda score exceeds ``owl_m`` times the mean score
    of all weights of the layer's experts (``slim/owl.py``); 0 for removed experts."""
    owl_m: Array | None = None
    """The factor behind ``owl_outliers_E``, shape []."""
    sensitivity_P2: Array | None = None
    """P points (experts removed from this layer alone, held-out loss then), the first
    at 0, ascending. ``Stats.sensitivity`` says by which rule they were removed."""


# What adds up over parts of the text; of every other field one copy stays.
SUMS = (
    *("tokens", "routed_E", "coactivation_EE"),
    *("score_full_sum_E", "score_selected_sum_E"),
    *("weighted_norm_sum_E", "weighted_sqnorm_sum_E", "contribution_gram_EE"),
    *("activation_norm_sum_E", "activation_sqnorm_sum_E"),
    *("output_sqdist_EE", "output_sqnorm_E"),
    *("moe_cosine_sum", "moe_only_cosine_sum"),
)

# Of parts of the text the larger one stays.
MAXIMA = ("activation_max_E",)
PER_SOURCE = frozenset({*SUMS, *MAXIMA})
ADDED = PER_SOURCE | {"output_sum_ED"}
"""What is kept for each source of text; the layer's own is put together from it."""


@dataclass(frozen=True, kw_only=True)
class SourceStats:
    """What one named source of the calibration text adds to the statistics."""

    layers: dict[int, LayerStats] = field(default_factory=dict)
    """Only what is in ``PER_SOURCE``, and the source's own ``sensitivity_P2``."""
    block_cosine_HH: Array | None = None
    block_tokens: Array | None = None


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Statistics of one checkpoint."""

    fingerprint: str
    layers: dict[int, LayerStats]
    forward_passes: int = 0
    calibration: dict[str, Any] = field(default_factory=dict)
    """Source, sha256 of the token ids, samples, sequence_length, seed."""
    block_cosine_HH: Array | None = None
    """Sum over sampled tokens of cos(h_i, h_j), H = layers + 1 hidden states: h_0
    enters the first block, h_i leaves block i - 1."""
    block_tokens: Array | None = None
    """Tokens behind ``block_cosine_HH``, shape []."""
    sensitivity: dict[str, Any] = field(default_factory=dict)
    """``rule``: as ``decide.sensitivity.rule`` spells it; ``tokens``: held-out ones."""
    trimming: str = ""
    """What stage 1 left when ``owl_outliers_E`` was counted, by
    ``decide.cut_plan.trimming``; empty where it was not."""
    sources: dict[str, SourceStats] = field(default_factory=dict)
    """By name, of texts that had names. Their sums are in ``layers`` too."""
    weight_hashes: WeightHashes = field(default_factory=dict)
    """Of the layers that were read."""

    def __add__(self, other: "Stats") -> "Stats":
        """Add the sums of two parts of the same checkpoint's calibration data."""
        if self.fingerprint != other.fingerprint or self.layers.keys() != (
            other.layers.keys()
        ):
            raise PlanError("statistics of two different checkpoints cannot be added.")
        if bool(self.sources) != bool(other.sources):
            raise PlanError(
                "of two parts to be added both name their sources, or none."
            )
        for at, found in self.weight_hashes.items():
            if other.weight_hashes.get(at, found) != found:
                raise PlanError(
                    "statistics of two states of a checkpoint cannot be added: "
                    f"{'layer ' * at.isdigit()}{at} is not the same."
                )
        layers = {
            index: _add_layers(mine, other.layers[index])
            for index, mine in self.layers.items()
        }
        # Parts share out the tokens of one pass; they do not add passes.
        passes = max(self.forward_passes, other.forward_passes)
        parts = self.calibration.get("parts", [self.calibration])
        parts = parts + other.calibration.get("parts", [other.calibration])
        return Stats(
            fingerprint=self.fingerprint,
            layers=layers,
            forward_passes=passes,
            calibration={"parts": parts},
            block_cosine_HH=_add(self.block_cosine_HH, other.block_cosine_HH),
            block_tokens=_add(self.block_tokens, other.block_tokens),
            sensitivity=self.sensitivity or other.sensitivity,
            trimming=self.trimming or other.trimming,
            sources={
                name: _add_sources(
                    self.sources.get(name, SourceStats()),
                    other.sources.get(name, SourceStats()),
                )
                for name in {**self.sources, **other.sources}
            },
            weight_hashes=self.weight_hashes | other.weight_hashes,
        )


def _add_sources(one: SourceStats, two: SourceStats) -> SourceStats:
    none = LayerStats()
    return SourceStats(
        layers={
            index: _add_layers(one.layers.get(index, none), two.layers.get(index, none))
            for index in {**one.layers, **two.layers}
        },
        block_cosine_HH=_add(one.block_cosine_HH, two.block_cosine_HH),
        block_tokens=_add(one.block_tokens, two.block_tokens),
    )


def together(name: str, parts: Sequence[Array]) -> Array:
    """What a layer has of a quantity of which each source has a part."""
    # One after the other: NumPy's own sum would depend on how many there are.
    return np.asarray(reduce(np.maximum if name in MAXIMA else np.add, parts))


def _add_layers(one: LayerStats, two: LayerStats) -> LayerStats:
    merged: dict[str, Array | None] = {}
    for item in fields(LayerStats):
        a, b = getattr(one, item.name), getattr(two, item.name)
        if item.name in ADDED:
            known = [part for part in (a, b) if part is not None]
            merged[item.name] = together(item.name, known) if known else None
        else:
            merged[item.name] = a if a is not None else b
    return LayerStats(**merged)


def _add(one: Array | None, two: Array | None) -> Array | None:
    if one is None or two is None:
        return one if two is None else two
    return one + two

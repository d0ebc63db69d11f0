"""What is summed about a checkpoint, and the file it is kept in.

Data-free quantities come from the weights; the others are sums over calibration
tokens in float64, so that parts measured on different machines can be added.
"""

import json
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from ..errors import PlanError
from .container import TensorBytes, write_safetensors

Array = NDArray[np.float64]
FORMAT_VERSION = "1"


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
    contribution_gram_EE: Array | None = None
    """Sum over tokens of <c_i(t), c_j(t)>, perhaps over a part of the tokens only."""
    output_sqdist_EE: Array | None = None
    """Sum over sampled tokens of ||E_i(x) - E_j(x)||^2, whoever was chosen."""
    output_sqnorm_E: Array | None = None
    """Sum over the same tokens of ||E_i(x)||^2."""
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


SUMS = (
    *("tokens", "routed_E", "coactivation_EE"),
    *("score_full_sum_E", "score_selected_sum_E"),
    *("weighted_norm_sum_E", "weighted_sqnorm_sum_E", "contribution_gram_EE"),
    *("output_sqdist_EE", "output_sqnorm_E"),
    *("moe_cosine_sum", "moe_only_cosine_sum"),
)


MODEL_ARRAYS = ("block_cosine_HH", "block_tokens")
"""Fields of ``Stats`` that are arrays."""


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

    def __add__(self, other: "Stats") -> "Stats":
        """Add the sums of two parts of the same checkpoint's calibration data."""
        if self.fingerprint != other.fingerprint or self.layers.keys() != (
            other.layers.keys()
        ):
            raise PlanError("statistics of two different checkpoints cannot be added.")
        layers = {
            index: _add_layers(mine, other.layers[index])
            for index, mine in self.layers.items()
        }
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
        )


def _add_layers(one: LayerStats, two: LayerStats) -> LayerStats:
    merged: dict[str, Array | None] = {}
    for item in fields(LayerStats):
        a, b = getattr(one, item.name), getattr(two, item.name)
        if item.name in SUMS:
            merged[item.name] = _add(a, b)
        else:
            merged[item.name] = a if a is not None else b
    return LayerStats(**merged)


def _add(one: Array | None, two: Array | None) -> Array | None:
    if one is None or two is None:
        return one if two is None else two
    return one + two


def save_stats(stats: Stats, path: Path) -> None:
    """Write ``stats.safetensors`` atomically."""
    arrays = {
        f"layers.{index}.{item.name}": np.asarray(value, np.float64, order="C")
        for index, layer in stats.layers.items()
        for item in fields(LayerStats)
        if (value := getattr(layer, item.name)) is not None
    }
    for name in MODEL_ARRAYS:
        if (whole := getattr(stats, name)) is not None:
            arrays[f"model.{name}"] = np.asarray(whole, np.float64, order="C")
    header = {
        "moe_prune_stats": FORMAT_VERSION,
        "fingerprint": stats.fingerprint,
        "forward_passes": str(stats.forward_passes),
        "layers": json.dumps(sorted(stats.layers)),
        "calibration": json.dumps(stats.calibration, sort_keys=True),
        "sensitivity": json.dumps(stats.sensitivity, sort_keys=True),
        "trimming": stats.trimming,
    }
    parts = {
        name: TensorBytes("F64", array.shape, array.reshape(-1).data)
        for name, array in arrays.items()
    }
    write_safetensors(path, parts, header)


def load_stats(path: Path) -> Stats:
    """Read a statistics file; refuse one that this version did not write."""
    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            if header.get("moe_prune_stats") != FORMAT_VERSION:
                raise PlanError(
                    f"{path}: not a statistics file of format {FORMAT_VERSION}; "
                    "make it with `vllm-moe-prune measure`."
                )
            values: dict[int, dict[str, Array]] = {
                int(index): {} for index in json.loads(header["layers"])
            }
            whole: dict[str, Array] = {}
            names: list[str] = file.keys()  # safe_open itself is not iterable
            for name in names:
                if name.removeprefix("model.") in MODEL_ARRAYS:
                    whole[name.removeprefix("model.")] = file.get_tensor(name)
                    continue
                _, index, quantity = name.split(".")
                values[int(index)][quantity] = file.get_tensor(name)
        _check_shapes(values)
        return Stats(
            fingerprint=header["fingerprint"],
            layers={index: LayerStats(**items) for index, items in values.items()},
            forward_passes=int(header["forward_passes"]),
            calibration=_object(header["calibration"]),
            sensitivity=_object(header.get("sensitivity", "{}")),
            trimming=header.get("trimming", ""),
            **whole,
        )
    except FileNotFoundError as error:
        raise PlanError(f"{path}: no such statistics file.") from error
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise PlanError(
            f"{path}: damaged statistics file: {error}. Make it again with "
            "`vllm-moe-prune measure`."
        ) from error


def _object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {text[:40]!r}")
    return value


def _check_shapes(layers: dict[int, dict[str, Array]]) -> None:
    """Compare arrays with the axis letters their names end in."""
    for index, arrays in layers.items():
        experts: int | None = None
        for name, array in arrays.items():
            suffix = re.search(r"(?<=_)[A-Z][A-Z0-9]*$", name)
            axes = suffix[0] if suffix else ""
            if array.ndim == len(axes) and axes.startswith("E") and experts is None:
                experts = len(array)
            sizes = [{"E": experts, "5": 5, "2": 2}.get(axis) for axis in axes]
            if array.ndim != len(axes) or any(
                size not in (None, found)
                for size, found in zip(sizes, array.shape, strict=True)
            ):
                raise ValueError(
                    f"layer {index}: {name} has shape {list(array.shape)}, but the "
                    f"layer has {experts} experts"
                )

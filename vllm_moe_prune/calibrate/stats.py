"""What is summed about a checkpoint, and the file it is kept in.

Data-free quantities come from the weights; the others are sums over calibration
tokens in float64, so that parts measured on different machines can be added.
"""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..errors import PlanError

Array = NDArray[np.float64]
FORMAT_VERSION = "1"


@dataclass(frozen=True)
class LayerStats:
    """Statistics of one MoE layer; E experts. Absent ones were not measured."""

    router_sqdist_EE: Array | None = None
    """Squared L2 distance between router rows."""
    router_norm: Array | None = None
    """Frobenius norm of the whole router, shape []."""
    weight_sqdist_EE: Array | None = None
    """Squared L2 distance between experts, all their matrices concatenated."""
    tokens: Array | None = None
    """Calibration tokens seen by the layer, shape []."""
    routed_E: Array | None = None
    """Tokens routed to each expert."""
    coactivation_EE: Array | None = None
    """Tokens that were routed to both experts; symmetric, zero diagonal."""


SUMS = ("tokens", "routed_E", "coactivation_EE")


@dataclass(frozen=True)
class Stats:
    """Statistics of one checkpoint."""

    fingerprint: str
    layers: dict[int, LayerStats]
    forward_passes: int = 0
    calibration: dict[str, Any] = field(default_factory=dict)
    """Source, sha256 of the token ids, samples, sequence_length, seed."""

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
        return Stats(self.fingerprint, layers, passes, {"parts": parts})


def _add_layers(one: LayerStats, two: LayerStats) -> LayerStats:
    merged: dict[str, Array | None] = {}
    for item in fields(LayerStats):
        a, b = getattr(one, item.name), getattr(two, item.name)
        if item.name in SUMS and a is not None and b is not None:
            merged[item.name] = a + b
        else:
            merged[item.name] = a if a is not None else b
    return LayerStats(**merged)


def save_stats(stats: Stats, path: Path) -> None:
    """Write ``stats.safetensors`` atomically."""
    arrays = {
        f"layers.{index}.{item.name}": np.ascontiguousarray(value, dtype=np.float64)
        for index, layer in stats.layers.items()
        for item in fields(LayerStats)
        if (value := getattr(layer, item.name)) is not None
    }
    header = {
        "moe_prune_stats": FORMAT_VERSION,
        "fingerprint": stats.fingerprint,
        "forward_passes": str(stats.forward_passes),
        "layers": json.dumps(sorted(stats.layers)),
        "calibration": json.dumps(stats.calibration, sort_keys=True),
    }
    temporary = path.with_name(path.name + ".tmp")
    save_file(arrays, temporary, metadata=header)
    temporary.replace(path)


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
            names: list[str] = file.keys()  # safe_open itself is not iterable
            for name in names:
                _, index, quantity = name.split(".")
                values[int(index)][quantity] = file.get_tensor(name)
    except FileNotFoundError as error:
        raise PlanError(f"{path}: no such statistics file.") from error
    except (SafetensorError, ValueError, KeyError) as error:
        raise PlanError(f"{path}: damaged statistics file: {error}") from error
    return Stats(
        fingerprint=header["fingerprint"],
        layers={index: LayerStats(**items) for index, items in values.items()},
        forward_passes=int(header["forward_passes"]),
        calibration=json.loads(header["calibration"]),
    )

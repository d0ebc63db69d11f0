"""What is summed about a checkpoint, and the file it is kept in.

Data-free quantities come from the weights; the others are sums over calibration
tokens in float64, so that parts measured on different machines can be added.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import reduce
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint.index import TensorInfo, read_bytes, read_header
from ..errors import CheckpointError, PlanError
from ..files.json_file import parse_json
from ..recipes.calibration import MOST_SOURCES, NAME
from ..recipes.numbers import MOST
from .container import TensorBytes, write_safetensors
from .stats_ranges import Array as Array
from .stats_ranges import check_blocks, check_numbers, check_shapes

FORMAT_VERSION = "2"
READ_VERSIONS = ("1", FORMAT_VERSION)
"""Version 1 knew no sources, and no statistics of outputs without router weight."""
MAX_BYTES = 2 << 30
"""Of all arrays together; those of 61 layers of 512 experts are a third of it."""


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
QUANTITIES = frozenset(item.name for item in fields(LayerStats))
MODEL_ARRAYS = ("block_cosine_HH", "block_tokens")
"""Fields of ``Stats`` that are arrays."""


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


def save_stats(stats: Stats, path: Path) -> None:
    """Write ``stats.safetensors`` atomically."""
    # Of sources only the parts are written, so that they cannot contradict their sum.
    arrays = _arrays(stats, skip=PER_SOURCE if stats.sources else frozenset())
    for source, part in stats.sources.items():
        found = _arrays(part)
        arrays |= {f"sources.{source}.{name}": value for name, value in found.items()}
    header = {
        "moe_prune_stats": FORMAT_VERSION,
        "fingerprint": stats.fingerprint,
        "forward_passes": str(stats.forward_passes),
        "layers": json.dumps(sorted(stats.layers)),
        "calibration": json.dumps(stats.calibration, sort_keys=True),
        "sensitivity": json.dumps(stats.sensitivity, sort_keys=True),
        "trimming": stats.trimming,
        "sources": json.dumps(list(stats.sources)),
    }
    parts = {
        name: TensorBytes("F64", array.shape, array.reshape(-1).data)
        for name, array in arrays.items()
    }
    write_safetensors(path, parts, header)


def _arrays(
    stats: Stats | SourceStats, skip: frozenset[str] = frozenset()
) -> dict[str, Array]:
    """Every array by its name in a file."""
    arrays = {
        f"layers.{index}.{item.name}": np.asarray(value, np.float64, order="C")
        for index, layer in stats.layers.items()
        for item in fields(LayerStats)
        if (value := getattr(layer, item.name)) is not None and item.name not in skip
    }
    for name in MODEL_ARRAYS:
        if (whole := getattr(stats, name)) is not None:
            arrays[f"model.{name}"] = np.asarray(whole, np.float64, order="C")
    return arrays


def load_stats(path: Path) -> Stats:
    """Read a statistics file of this version or an earlier one.

    Raises:
        PlanError: It is missing or damaged, or holds what no measurement gives.
    """
    try:
        found = read_header(path)
        header = found.metadata
        if header.get("moe_prune_stats") not in READ_VERSIONS:
            raise PlanError(
                f"{path}: not a statistics file of format {FORMAT_VERSION}; "
                "make it with `vllm-moe-prune measure`."
            )
        if sum(info.nbytes for info in found.tensors.values()) > MAX_BYTES:
            raise ValueError(f"it holds more than {MAX_BYTES} bytes of numbers")
        indices = [_index(index) for index in parse_json(header["layers"])]
        sources = {}
        for source, infos in _by_source(header, found.tensors).items():
            parts, model = _read_arrays(indices, infos, f"source {source}: ")
            if wrong := {*chain(*parts.values())} - PER_SOURCE - {"sensitivity_P2"}:
                raise ValueError(f"source {source}: {min(wrong)} is of no source")
            known = {index: LayerStats(**items) for index, items in parts.items()}
            sources[source] = SourceStats(layers=known, **model)
        own = {
            name: info
            for name, info in found.tensors.items()
            if not name.startswith("sources.")
        }
        layers, whole = _read_arrays(indices, own)
        for index, items in layers.items() if sources else ():
            _join(items, [one.layers[index] for one in sources.values()], index)
        return Stats(
            fingerprint=header["fingerprint"],
            layers={index: LayerStats(**items) for index, items in layers.items()},
            forward_passes=_passes(header["forward_passes"]),
            calibration=_object(header["calibration"]),
            sensitivity=_object(header.get("sensitivity", "{}")),
            trimming=header.get("trimming", ""),
            sources=sources,
            **whole,
        )
    except FileNotFoundError as error:
        raise PlanError(f"{path}: no such statistics file.") from error
    except (CheckpointError, OSError, ValueError, KeyError, TypeError) as error:
        said = str(error).removeprefix(f"{path}: ").removesuffix(".")
        raise PlanError(
            f"{path}: damaged statistics file: {said}. Make it again with "
            "`vllm-moe-prune measure`."
        ) from error


def _by_source(
    header: Mapping[str, str], tensors: Mapping[str, TensorInfo]
) -> dict[str, dict[str, TensorInfo]]:
    """The tensors of each source, by their names within it."""
    names = parse_json(header.get("sources", "[]"))
    if not isinstance(names, list) or len(names) > MOST_SOURCES:
        raise ValueError("its sources are no short list")
    found: dict[str, dict[str, TensorInfo]] = {}
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(NAME, name) or name in found:
            raise ValueError(f"{str(name)[:40]!r} is no source, or is there twice")
        found[name] = {}
    for name, info in tensors.items():
        if name.startswith("sources."):
            _, source, rest = name.split(".", 2)
            # KeyError for a source that the header does not list: told as damage.
            found[source][rest] = info
    return found


def _join(items: dict[str, Array], parts: Sequence[LayerStats], index: int) -> None:
    """Put a layer's statistics together from those of the sources, in place."""
    for name in sorted(PER_SOURCE):
        known = [part for one in parts if (part := getattr(one, name)) is not None]
        if known and (len(known) < len(parts) or name in items):
            raise ValueError(f"layer {index}: {name} is not of every source, or twice")
        if known:
            items[name] = together(name, known)
    check_shapes({name: item.shape for name, item in items.items()}, f"layer {index}")
    check_numbers(items, f"layer {index}")


def _read_arrays(
    indices: Sequence[int], tensors: Mapping[str, TensorInfo], where: str = ""
) -> tuple[dict[int, dict[str, Array]], dict[str, Array]]:
    """The arrays of every layer, and those of the whole model."""
    layers: dict[int, dict[str, TensorInfo]] = {index: {} for index in indices}
    whole: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        if info.dtype != "F64":
            raise ValueError(f"{name} is {info.dtype}, not F64")
        if name.removeprefix("model.") in MODEL_ARRAYS:
            whole[name.removeprefix("model.")] = info
            continue
        _, index, quantity = name.split(".")
        if quantity not in QUANTITIES:
            raise ValueError(f"{quantity} is no statistic")
        # KeyError for a layer that the header does not list: told as damage.
        layers[int(index)][quantity] = info
    # Shapes and sizes first: no data is read of a file that does not fit.
    for layer, infos in layers.items():
        shapes = {quantity: info.shape for quantity, info in infos.items()}
        check_shapes(shapes, f"{where}layer {layer}")
    check_shapes({name: info.shape for name, info in whole.items()}, f"{where}model")
    arrays = {
        layer: {quantity: _array(info) for quantity, info in infos.items()}
        for layer, infos in layers.items()
    }
    for layer, found in arrays.items():
        check_numbers(found, f"{where}layer {layer}")
    blocks = {name: _array(info) for name, info in whole.items()}
    check_blocks(blocks)
    return arrays, blocks


def _array(info: TensorInfo) -> Array:
    return np.frombuffer(read_bytes(info), np.dtype("<f8")).reshape(info.shape)


def _index(value: Any) -> int:
    # Not isinstance: JSON's true is an int in Python.
    if type(value) is not int or not 0 <= value < MOST:
        raise ValueError(f"{value!r} is no layer")
    return value


def _passes(text: str) -> int:
    passes = parse_json(text)
    if type(passes) is not int or not 0 <= passes < MOST:
        raise ValueError(f"{text!r} forward passes")
    return passes


def _object(text: str) -> dict[str, Any]:
    value = parse_json(text)
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {text[:40]!r}")
    return value

"""``stats.safetensors``: the file that statistics are kept in.

A statistics file is hostile until it has passed these checks: every number is checked
for its range where it is read.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from ..checkpoint.index import MAX_HEADER_VALUES, TensorInfo, read_bytes, read_header
from ..checkpoint.layer_hashes import WeightHashes
from ..errors import CheckpointError, PlanError
from ..files.json_file import parse_json
from ..recipes.calibration import MOST_SOURCES, NAME
from ..recipes.numbers import MOST
from .container import TensorBytes, write_safetensors
from .stats import PER_SOURCE, LayerStats, SourceStats, Stats, together
from .stats_ranges import Array, check_blocks, check_numbers, check_shapes

FORMAT_VERSION = "2"
READ_VERSIONS = ("1", FORMAT_VERSION)
"""Version 1 knew no sources, and no statistics of outputs without router weight."""
HASHES = TypeAdapter(WeightHashes)
MAX_BYTES = 2 << 30
"""Of all arrays together; those of 61 layers of 512 experts are a third of it."""
QUANTITIES = frozenset(item.name for item in fields(LayerStats))
MODEL_ARRAYS = ("block_cosine_HH", "block_tokens")
"""Fields of ``Stats`` that are arrays."""


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
        "weight_hashes": json.dumps(stats.weight_hashes),
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
            weight_hashes=HASHES.validate_python(
                parse_json(header.get("weight_hashes", "{}"), MAX_HEADER_VALUES)
            ),
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

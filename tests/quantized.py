"""Quantized checkpoints read without the package: what each stored number means.

R rows, C columns, G groups.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.reference import read_json, read_tensors

PARTS = ("weight_scale", "weight_shape", "weight_zero_point")


def nibbles(packed: Tensor) -> Tensor:
    """Eight values from -8 to 7 of each int32, the low bits first, along axis 1."""
    shifts = torch.arange(0, 32, 4)
    return ((packed.long()[:, :, None] >> shifts) & 15).flatten(1) - 8


def dense_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder as a model computes with it."""
    stored, dense = read_tensors(folder), {}
    for name, tensor in stored.items():
        base, _, part = name.rpartition(".")
        scale = stored.get(f"{base}.weight_scale")
        if part in PARTS:
            continue
        if part == "weight_packed":
            assert scale is not None
            rows, cols = stored[f"{base}.weight_shape"].tolist()
            values, shift = nibbles(tensor)[:, :cols], torch.zeros(rows, scale.shape[1])
            if (zero := stored.get(f"{base}.weight_zero_point")) is not None:
                shift = nibbles(zero.T).T[:rows]
            wide = cols // scale.shape[1]
            exact = (values - shift.repeat_interleave(wide, 1)).double()
            exact *= scale.double().repeat_interleave(wide, 1)
            dense[f"{base}.weight"] = exact.to(scale.dtype)
        elif scale is not None:
            high, wide = (
                -(-size // parts)
                for size, parts in zip(tensor.shape, scale.shape, strict=True)
            )
            spread = (
                scale.double().repeat_interleave(high, 0).repeat_interleave(wide, 1)
            )
            exact = tensor.float().double() * spread
            dense[name] = exact.to(scale.dtype)
        else:
            dense[name] = tensor
    return dense


def write_dense(quantized: Path, out: Path) -> Path:
    """A quantized checkpoint as an ordinary one."""
    return _write(quantized, out, dense_tensors(quantized))


def write_untrimmed(original: Path, quantized: Path, out: Path) -> Path:
    """The original with what a trimmed, quantized checkpoint made of its weights.

    Everything is where it was in the original, as references that mask want it.
    """
    tensors, found = read_tensors(original), dense_tensors(quantized)
    layers = read_json(quantized / "expert_remap.json")["layers"]
    for name, tensor in found.items():
        place = name.split(".")
        if "layers" not in place:
            tensors[name] = tensor
            continue
        at = place.index("layers") + 1
        entry = layers[int(place[at])]
        place[at] = str(entry["original_layer"])
        if "experts" in place:
            one = place.index("experts") + 1
            place[one] = str(entry["kept"][int(place[one])])
        old = ".".join(place)
        if tensor.shape == tensors[old].shape:
            tensors[old] = tensor
        else:
            # Rows of experts; those of experts that are gone stay as they were.
            tensors[old] = tensors[old].clone()
            tensors[old][entry["kept"]] = tensor
    return _write(original, out, tensors)


def add_outliers(folder: Path) -> Path:
    """Make every eighth input of the experts eight times as large, as AWQ likes it."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name.endswith("post_attention_layernorm.weight"):
                tensor[::8] *= 8
        save_file(tensors, path, metadata={"format": "pt"})
    return folder


def _write(source: Path, out: Path, tensors: dict[str, Tensor]) -> Path:
    out.mkdir()
    for path in source.iterdir():
        plain = path.is_file() and "safetensors" not in path.name
        if plain and path.name != "config.json":
            shutil.copy(path, out)
    config = read_json(source / "config.json")
    config.pop("quantization_config", None)
    (out / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out

"""Checkpoints in the layouts of GPTQ's and AWQ's own tools, written from their formats.

R rows, C columns, G groups.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.reference import read_json, read_tensors
from tests.tiny import tiny_checkpoint

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
BLOCKS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "desc_act": True, "sym": False},
    "gptq-symmetric": {"quant_method": "gptq", "desc_act": False, "sym": True},
    "gptq_v2": {
        "quant_method": "gptq",
        "desc_act": True,
        "checkpoint_format": "gptq_v2",
    },
    "awq": {"quant_method": "awq", "version": "gemm", "zero_point": True},
}


def words(values: Tensor, order: list[int]) -> Tensor:
    """Each eight values of a row as one int32: value ``order[i]`` at bits 4 i."""
    packed = torch.zeros(values.shape[0], values.shape[1] // 8, dtype=torch.int64)
    for place, which in enumerate(order):
        packed |= values[:, which::8].long() << (4 * place)
    return packed.to(torch.int32)


def quantized(
    name: str, tensor: Tensor, seed: int, group: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Parts of a matrix with random numbers, and what they stand for."""
    rows, cols = tensor.shape
    made = torch.Generator().manual_seed(seed)
    groups = cols // group
    values_RC = torch.randint(0, 16, (rows, cols), generator=made)
    zero_RG = torch.randint(1, 16, (rows, groups), generator=made)
    if name == "gptq-symmetric":
        zero_RG = torch.full((rows, groups), 8)
    scale_RG = (torch.rand(rows, groups, generator=made) / 50 + 0.001).half()
    group_C = torch.arange(cols) // group
    if BLOCKS[name].get("desc_act"):
        group_C = group_C[torch.randperm(cols, generator=made)]
    dense = torch.empty(rows, cols)
    for col in range(cols):
        at = int(group_C[col])
        steps_R = values_RC[:, col] - zero_RG[:, at]
        dense[:, col] = steps_R.float() * scale_RG[:, at].float()
    parts = {"scales": scale_RG.T}
    if name == "awq":
        parts["qweight"] = words(values_RC.T, AWQ_ORDER)
        parts["qzeros"] = words(zero_RG.T, AWQ_ORDER)
    else:
        parts["qweight"] = words(values_RC, list(range(8))).T
        less = 0 if name == "gptq_v2" else 1
        parts["qzeros"] = words(zero_RG.T - less, list(range(8)))
        parts["g_idx"] = group_C.to(torch.int32)
    found = {part: each.contiguous() for part, each in parts.items()}
    return found, dense.bfloat16()


def make(folder: Path, name: str, group: int = 32, **options: Any) -> dict[str, Tensor]:
    """A checkpoint in a layout; returns what it should be read as."""
    tiny_checkpoint(folder, **({"hidden": 64, "width": 96, "experts": 6} | options))
    stored, expected = {}, {}
    for seed, (at, tensor) in enumerate(read_tensors(folder).items()):
        plain = tensor.dim() != 2 or "embed" in at or "lm_head" in at or ".gate." in at
        if plain:
            stored[at] = expected[at] = tensor
            continue
        parts, expected[at] = quantized(name, tensor, seed, group)
        base = at.removesuffix(".weight")
        stored |= {f"{base}.{part}": each for part, each in parts.items()}
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = read_json(folder / "config.json")
    config["quantization_config"] = {"bits": 4, "group_size": group} | BLOCKS[name]
    (folder / "config.json").write_text(json.dumps(config))
    return expected

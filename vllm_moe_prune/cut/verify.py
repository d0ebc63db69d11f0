"""Checks on a finished folder: shapes, counts, remap table, and its weights.

Against its source, every surviving tensor is compared: copies bit for bit, means
recomputed, slimmed matrices equal to the source wherever they are not zero, and as
many zeros in each as the plan says; of quantized ones see ``cut/verify_quantized.py``.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from ..checkpoint.compressed import CompressedTensor
from ..checkpoint.index import TensorInfo, read_index
from ..checkpoint.open import Checkpoint
from ..checkpoint.quantized_tensors import PartedTensor
from ..checkpoint.reader import read_row, read_tensor
from ..checkpoint.source import open_checkpoint
from ..checkpoint.tensor_hashes import check_hashes
from ..decide.check_plan import check_plan
from ..decide.cut_plan import CutPlan, load_plan
from ..errors import CheckpointError, RemapError
from ..files.json_file import parse_json, read_json
from ..progress import Progress, Report, ignore
from ..slim.quota import zeros_in_matrix
from .build_remap import build_remap
from .channels import read_channels, take_channels
from .config import pruned_config
from .copy import group_mean
from .finish import PROVENANCE
from .means import check_constants
from .output import RECOVERED
from .slice import OutputTensor, output_tensors
from .verify_files import check_companions
from .verify_quantized import check_quantized, check_scaled, is_refitted


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What was checked and found right."""

    folder: Path
    layers: int
    experts: int
    tensors_compared: int
    bytes_compared: int
    zeros: int
    """Zeros counted in surviving expert weights; 0 if there was no source."""
    expert_sparsity: float | None
    """Recounted from the weights; None if there was no source to compare with."""
    total_sparsity: float | None
    tensors_hashed: int | None
    """Tensors whose bytes are those that were written; None: the folder is older than
    the hashes of tensors, so nothing is known."""


def verify(
    folder: Path,
    source: Checkpoint | None = None,
    report: Report = ignore,
    *,
    allow_links: bool = False,
) -> Verified:
    """Check a pruned checkpoint, and compare it with its source if that is given.

    Without a source its weights are read too, and compared with their hashes.

    Raises:
        CheckpointError: A tensor is missing, misshapen or differs from its source, or a
            file beside the weights does.
        RemapError: The remap table is missing, was changed or contradicts the weights.
    """
    output = open_checkpoint(folder, allow_links=allow_links)
    if output.remap is None:
        raise RemapError(
            f"{folder}: config.json has no moe_prune block; this is not an output of "
            "vllm-moe-prune."
        )
    experts = sum(layer.num_experts for layer in output.moe_layers)
    if source is None:
        check_compressed(output)
        return Verified(
            folder=folder,
            layers=len(output.layers),
            experts=experts,
            tensors_compared=0,
            bytes_compared=0,
            zeros=0,
            expert_sparsity=None,
            total_sparsity=None,
            tensors_hashed=_check_hashes(output, report),
        )
    history = folder / "provenance.json"
    if history.is_file() and read_json(history, PROVENANCE).get(RECOVERED):
        raise CheckpointError(
            f"{folder}: was trained after the cut (see its provenance.json), so "
            "its values differ from the source's. Verify it without --source."
        )
    plan = load_plan(folder / "plan.json")
    # plan.json is of the folder under test, hence as suspect as its weights.
    check_plan(plan, source.layers, source.fingerprint, str(folder / "plan.json"))
    _check_names(output, source, plan)
    check_companions(folder, source)
    check_constants(output, source, plan)
    zeros, dense_zeros, done, at = 0, 0, 0, 0
    tensors = output_tensors(source, plan)
    kept = _KeptChannels(folder, source, plan)
    total = sum(output.stored(tensor.name).nbytes for tensor in tensors)
    for tensor in tensors:
        found = 0
        if tensor.made == "copied":
            found = _compare(source, output, tensor, plan, kept)
        elif tensor.made == "scaled":
            check_scaled(source, output, tensor)
        # The first part of a matrix; the others are compared together with it.
        elif tensor.stands_for:
            check_quantized(source, output, tensor, plan, kept.of(tensor, 0))
        if tensor.is_expert:
            zeros += found
        else:
            dense_zeros += found
        done += output.stored(tensor.name).nbytes
        if tensor.layer is not None:
            at = max(at, tensor.layer)  # those of no layer come first and last
        layers = len(source.layers)
        report(
            Progress(
                stage="verify",
                layer=at,
                layers=layers,
                bytes_done=done,
                bytes_total=total,
            )
        )
    removed = source.expert_parameters - output.expert_parameters
    removed_all = source.parameters - output.parameters
    return Verified(
        folder=folder,
        layers=len(output.layers),
        experts=experts,
        tensors_compared=len(tensors),
        bytes_compared=done,
        zeros=zeros,
        expert_sparsity=(removed + zeros) / source.expert_parameters,
        total_sparsity=(removed_all + zeros + dense_zeros) / source.parameters,
        tensors_hashed=_check_hashes(output, report),
    )


def _check_hashes(output: Checkpoint, report: Report) -> int | None:
    stored = read_index(output.folder, allow_links=output.allow_links)
    return check_hashes(output.folder, stored, report)


def check_compressed(checkpoint: Checkpoint) -> None:
    """Read every tensor that is stored in parts: do they fit together?

    Raises:
        CheckpointError: Naming the tensor, and of a compressed one the row.
    """
    for info in checkpoint.tensors.values():
        if isinstance(info, CompressedTensor):
            info.check()
        elif isinstance(info, PartedTensor):
            info.dense()


def _check_names(output: Checkpoint, source: Checkpoint, plan: CutPlan) -> None:
    expected = {tensor.name for tensor in output_tensors(source, plan)}
    if missing := sorted(expected - output.stored_names):
        raise CheckpointError(f"{output.folder}: tensor {missing[0]!r} is missing.")
    if extra := sorted(output.stored_names - expected):
        raise CheckpointError(f"{output.folder}: tensor {extra[0]!r} is not planned.")
    remap = build_remap(source, plan)
    if remap != output.remap:
        raise RemapError(
            f"{output.folder}: expert_remap.json is not the table of plan.json."
        )
    # Through JSON as the file went: tuples are lists there, keys are strings.
    if parse_json(json.dumps(pruned_config(source, plan, remap))) != output.config:
        raise CheckpointError(
            f"{output.folder}: config.json is not the one plan.json leads to."
        )


class _KeptChannels:
    """The channels that narrowed experts kept; one layer's in memory at a time."""

    def __init__(self, folder: Path, source: Checkpoint, plan: CutPlan) -> None:
        self._folder, self._source, self._plan = folder, source, plan
        self._layer: int | None = None
        self._kept: list[torch.Tensor] = []

    def of(self, tensor: OutputTensor, position: int) -> torch.Tensor | None:
        """Those of the expert that a tensor, or one row of it, is of; None: all."""
        if tensor.layer is None or not tensor.of_experts:
            return None
        layer = self._plan.layers[tensor.layer]
        if layer.width is None:
            return None
        if tensor.layer != self._layer:
            before = self._source.layers[tensor.layer].width
            self._kept = read_channels(
                self._folder, tensor.layer, len(layer.keep), before, layer.width
            )
            self._layer = tensor.layer
        return self._kept[position if tensor.expert is None else tensor.expert]


def _compare(
    source: Checkpoint,
    output: Checkpoint,
    tensor: OutputTensor,
    plan: CutPlan,
    kept: _KeptChannels,
) -> int:
    """Compare one tensor group by group; returns the zeros in a slimmed matrix."""
    info = output.stored(tensor.name)
    counted = tensor.is_expert or tensor.sparsity > 0
    zeros = 0
    for position, group in enumerate(tensor.groups):
        expected = group_mean(source, group)
        if (kept_K := kept.of(tensor, position)) is not None:
            block = _scale_block(source, tensor)
            expected = take_channels(expected, tensor, kept_K, block)
        found = _read_group(info, position, len(tensor.groups), expected)
        same = _bits(found) == _bits(expected)
        if found.dtype == torch.float8_e4m3fn:
            # Few operations know FP8; every value of it is one of fp32.
            found, expected = found.float(), expected.float()
        # Of weights that were changed only their being finite is sure.
        if tensor.updated or is_refitted(tensor, plan):
            same |= torch.isfinite(found)
        elif tensor.sparsity > 0:
            same |= found == 0
        if not bool(same.all()):
            wrong = int((~same).sum())
            raise CheckpointError(
                f"{info.file}: {tensor.name}: {wrong} values differ from the source."
            )
        if tensor.sparsity > 0:
            # gate and up are slimmed as two matrices, each with its own quota.
            halves = 2 if tensor.role == "gate_up" else 1
            pairs = zip(found.chunk(halves), expected.chunk(halves), strict=True)
            for matrix, original in pairs:
                _check_zeros(matrix, original, tensor, plan, str(info.file))
        if counted:
            zeros += found.numel() - int(torch.count_nonzero(found))
    return zeros


def _scale_block(source: Checkpoint, tensor: OutputTensor) -> int:
    """Channels that each entry along a tensor's axis of channels stands for."""
    blocks = source.blocks
    if blocks is None or not source.is_scale(tensor.groups[0][0].source):
        return 1
    return blocks.cols if tensor.channels else blocks.rows


def _check_zeros(
    found: torch.Tensor,
    expected: torch.Tensor,
    tensor: OutputTensor,
    plan: CutPlan,
    where: str,
) -> None:
    """Count one slimmed matrix's zeros; the source's own may come on top."""
    if plan.slim == "none":
        return
    rows, cols = found.shape
    asked = zeros_in_matrix(plan.slim, rows, cols, tensor.sparsity, plan.group)
    zeros = found.numel() - int(torch.count_nonzero(found))
    written = int(((found == 0) & (expected != 0)).sum())
    # The source's own zeros may fill the quota, or come on top of it.
    if zeros < asked or written > asked:
        raise CheckpointError(
            f"{where}: {tensor.name}: holds {zeros} zeros in a {rows} x {cols} matrix, "
            f"the plan asks for {asked}."
        )


def _read_group(
    info: TensorInfo, position: int, groups: int, expected: torch.Tensor
) -> torch.Tensor:
    if groups == 1 and tuple(expected.shape) == info.shape:
        return read_tensor(info)
    return read_row(info, position)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Values as integers, so that NaN equals itself and -0.0 differs from 0.0."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.element_size()])

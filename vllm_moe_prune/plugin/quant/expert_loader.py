"""Turns expert matrices, as they stream in, into the blocks that kernels run on.

Matrices come dense or in parts, in any order, whole or not at all for this process; of
FP8, scales come as well. What is held beside the finished blocks is one expert's
matrices; blocks go to the layer's device expert by expert. D hidden, F width.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ...checkpoint.block_fp8 import SUFFIX, ScaleBlocks
from ...errors import CheckpointError, ServeError
from ...kernels import cpu_encode
from ...kernels.bitmask import Bitmask, check
from ...kernels.blocks import BLOCK, FP8, STEP, Blocks, join
from ..load.packed import is_complete
from .expert_loader_base import ExpertLoaderBase

Matrix = Tensor | Bitmask
HOST = torch.device("cpu")
KINDS = {"w1": "w13", "w3": "w13", "w2": "w2"}
"""vLLM's gate, up and down, and which of them are encoded together."""


class ExpertLoader(ExpertLoaderBase):
    """Makes blocks of them."""

    def __init__(
        self,
        layer: Any,
        *,
        experts: int,
        hidden: int,
        width: int,
        dtype: torch.dtype,
        scaled: ScaleBlocks | None = None,
        device: torch.device = HOST,
    ) -> None:
        """For a layer of vLLM's.

        Args:
            layer: The layer.
            experts: Of this process.
            hidden: D.
            width: The part of F of this process.
            dtype: Of the weights, if they are not FP8.
            scaled: Of FP8: what has a scale in common.
            device: Where the blocks belong.

        Raises:
            ServeError: Processes would share what has a scale in common, or blocks.
        """
        super().__init__(layer, experts=experts, hidden=hidden, width=width)
        self.device = device
        self._scaled = scaled
        self._dtype = dtype if scaled is None else FP8
        ranks = self._parallel.tp_size
        if scaled is not None and (
            scaled.rows % BLOCK or scaled.cols % STEP or (ranks > 1 and width % STEP)
        ):
            raise ServeError(
                f"{layer.layer_name}: FP8 experts with scales for {scaled.rows} x "
                f"{scaled.cols} weights cannot be split into parts {width} wide; the "
                f"sizes must divide by {BLOCK}, {STEP} and {STEP}. Use fewer ranks."
            )
        self._held: dict[int, dict[str, Matrix]] = {}
        self._scales: dict[int, dict[str, Tensor]] = {}
        self._w13: dict[int, Blocks] = {}
        self._w2: dict[int, Blocks] = {}
        self._joined: dict[str, Blocks] = {}

    @property
    def dense_bytes(self) -> int:
        """What the layer's experts take when they are stored dense."""
        return self._experts * 3 * self.hidden * self.width * self._dtype.itemsize

    def take(
        self, local: int, shard_id: str, name: str, tensor: Tensor, where: str
    ) -> None:
        """A dense matrix, a part of one, or its scales.

        Raises:
            CheckpointError: The tensor has another shape, or its parts disagree.
        """
        # w13_weight_scale_inv gives weight_scale_inv, w2_mask gives mask.
        part = name.rpartition(".")[2].partition("_")[2]
        if part == "weight":
            self._add(local, shard_id, tensor, name)
            return
        if part == f"weight{SUFFIX}":
            scales = self._grid(shard_id, tensor, name)
            # They come before their matrix or after it; whatever is last encodes.
            self._scales.setdefault(local, {})[shard_id] = scales
            self._encode(local, KINDS[shard_id])
            return
        parts = self._parts.setdefault((local, shard_id), {})
        # A copy: what vLLM hands over may be a view into a file that it will close.
        parts[part] = tensor.cpu().clone()
        if is_complete(parts):
            del self._parts[local, shard_id]
            packed = Bitmask(parts["mask"], parts["values"], parts.get("offsets"))
            check(packed, self.whole_shape(shard_id), where)
            self._add(local, shard_id, packed, name)

    def _add(self, local: int, shard_id: str, matrix: Matrix, name: str) -> None:
        expected = self.whole_shape(shard_id)
        if tuple(matrix.shape) != expected:
            raise CheckpointError(
                f"{name}: expert matrix {shard_id} has shape {list(matrix.shape)}, "
                f"expected {list(expected)}."
            )
        stored = matrix.values if isinstance(matrix, Bitmask) else matrix
        if self._scaled is not None and stored.dtype != FP8:
            raise CheckpointError(
                f"{name}: expert matrix {shard_id} is {stored.dtype}; config.json "
                f"says that weights are {FP8}."
            )
        held = self._held.setdefault(local, {})
        # Compressed until its partner comes; encode_stored expands 16 rows at a time.
        if isinstance(matrix, Bitmask) and stored.dtype == self._dtype:
            held[shard_id] = matrix
        else:
            dense = matrix
            if isinstance(dense, Bitmask):
                dense = cpu_encode.unpack_matrix(dense)
            # Split, then converted: only this process's part is ever copied.
            own = self.own(shard_id, dense)
            held[shard_id] = own.to(device="cpu", dtype=self._dtype)
        self._encode(local, KINDS[shard_id])
        waiting = held.get(shard_id)
        if isinstance(waiting, Tensor):  # for another one; see above
            held[shard_id] = waiting.clone()

    def _grid(self, shard_id: str, scales: Tensor, name: str) -> Tensor:
        """The scale of each BLOCK outputs and STEP inputs, of this process."""
        assert self._scaled is not None
        whole = self.whole_shape(shard_id)
        expected = self._scaled.scale_shape(whole)
        if tuple(scales.shape) != expected:
            raise CheckpointError(
                f"{name}: the scales of {shard_id} have shape {list(scales.shape)}, "
                f"expected {list(expected)}."
            )
        start = self._parallel.tp_rank * self.width
        here = (
            (self.hidden, self.width) if shard_id == "w2" else (self.width, self.hidden)
        )
        first = (0, start) if shard_id == "w2" else (start, 0)
        # The checkpoint's block that each kernel tile lies in; sizes divide (__init__).
        rows = (
            first[0] + torch.arange(0, here[0], BLOCK, device="cpu")
        ) // self._scaled.rows
        cols = (
            first[1] + torch.arange(0, here[1], STEP, device="cpu")
        ) // self._scaled.cols
        return scales.to(device="cpu", dtype=torch.float32)[rows][:, cols]

    def _encode(self, local: int, kind: str) -> None:
        """Gate with up, or down, once everything of it is there."""
        shards = [shard for shard, each in KINDS.items() if each == kind]
        held, scales = self._held.get(local, {}), self._scales.get(local, {})
        scaled = self._scaled is not None
        if not all(s in held and (s in scales or not scaled) for s in shards):
            return
        found = self._w13 if kind == "w13" else self._w2
        found[local] = self._blocks(
            # w3 or w2: it only says which axis the processes share.
            shards[-1],
            [held.pop(shard) for shard in shards],
            [scales.pop(shard) for shard in shards] if scaled else None,
        ).to(self.device)
        if len(found) == self._experts:
            # By index, since experts arrive in any order.
            self._joined[kind] = join([found[e] for e in range(self._experts)])
            found.clear()

    def _blocks(
        self, shard_id: str, matrices: list[Matrix], scales: list[Tensor] | None
    ) -> Blocks:
        """Of gate and up, or of down; straight from stored ones if all of them are."""
        stored = [one for one in matrices if isinstance(one, Bitmask)]
        if len(stored) == len(matrices):
            start = self._parallel.tp_rank * self.width
            down = shard_id == "w2"
            first = (0, start) if down else (start, 0)
            shape = (self.hidden, self.width) if down else (self.width, self.hidden)
            return cpu_encode.encode_stored(stored, first, shape, scales)
        dense = [
            self.own(shard_id, cpu_encode.unpack_matrix(one))
            if isinstance(one, Bitmask)
            else one
            for one in matrices
        ]
        return cpu_encode.encode(dense, scales)

    def finished(self) -> tuple[Blocks, Blocks]:
        """Gate with up, and down, of all experts of this process; asked for once.

        Raises:
            ServeError: Some did not arrive.
        """
        missing = {"w13", "w2"} - self._joined.keys()
        if missing:
            raise ServeError(
                f"{self._layer.layer_name}: weights of some of its {self._experts} "
                f"experts did not arrive ({_listed(missing)}); with --quantization "
                "moe_prune, --load-format dummy has none to load."
            )
        return self._joined.pop("w13"), self._joined.pop("w2")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))

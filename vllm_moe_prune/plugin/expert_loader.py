"""Turns expert matrices, as they stream in, into the blocks that kernels run on.

Matrices come dense or in parts, in any order, whole or not at all for this process.
What is held beside the finished blocks is one expert's matrices. D hidden, F width.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.compressed import PARTS
from ..errors import CheckpointError, ServeError
from ..kernels import cpu_library
from ..kernels.bitmask import Bitmask, check
from ..kernels.blocks import Blocks, join


class ExpertLoader:
    """One layer's experts on their way into memory."""

    def __init__(
        self, layer: Any, *, experts: int, hidden: int, width: int, dtype: torch.dtype
    ) -> None:
        """For a layer of vLLM's; ``width`` is the part of this process."""
        self.hidden, self.width = hidden, width
        self._layer, self._dtype, self._experts = layer, dtype, experts
        self._parts: dict[tuple[int, str], dict[str, Tensor]] = {}
        self._dense: dict[int, dict[str, Tensor]] = {}
        self._w13: dict[int, Blocks] = {}
        self._w2: dict[int, Blocks] = {}
        self._joined: dict[str, Blocks] = {}

    @property
    def dense_bytes(self) -> int:
        """What the layer's experts take when they are stored dense."""
        return self._experts * 3 * self.hidden * self.width * self._dtype.itemsize

    def load(
        self,
        param: Any,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool:
        """vLLM's weight loader: take one tensor of one expert.

        Args:
            param: The placeholder, which stays empty.
            loaded_weight: The tensor, for all processes.
            weight_name: Ends in ``weight``, or in the name of a part.
            shard_id: ``w1`` gate, ``w3`` up, ``w2`` down.
            expert_id: Among all experts.
            return_success: vLLM's; the answer is returned either way.

        Returns:
            Whether this process has the expert.

        Raises:
            CheckpointError: The tensor has another shape, or its parts disagree.
        """
        local = self._layer._map_global_expert_id_to_local_expert_id(expert_id)
        if local < 0:
            return False
        part = weight_name.rpartition(".")[2].rpartition("_")[2]
        if part == "weight":
            self._add(local, shard_id, loaded_weight, weight_name)
            return True
        parts = self._parts.setdefault((local, shard_id), {})
        # A copy: what vLLM hands over may be a view into a file that it will close.
        parts[part] = loaded_weight.clone()
        if _is_complete(parts):
            del self._parts[local, shard_id]
            packed = Bitmask(parts["mask"], parts["values"], parts.get("offsets"))
            where = f"{weight_name}, expert {expert_id}, {shard_id}"
            check(packed, self._whole_shape(shard_id), where)
            dense = cpu_library.unpack_matrix(packed)
            self._add(local, shard_id, dense, weight_name)
        return True

    def _whole_shape(self, shard_id: str) -> tuple[int, int]:
        parallel = self._layer.moe_config.moe_parallel_config
        width = self.width * parallel.tp_size
        return (self.hidden, width) if shard_id == "w2" else (width, self.hidden)

    def _add(self, local: int, shard_id: str, dense: Tensor, name: str) -> None:
        expected = self._whole_shape(shard_id)
        if tuple(dense.shape) != expected:
            raise CheckpointError(
                f"{name}: expert matrix {shard_id} has shape {list(dense.shape)}, "
                f"expected {list(expected)}."
            )
        parallel = self._layer.moe_config.moe_parallel_config
        axis = 1 if shard_id == "w2" else 0
        if parallel.tp_size > 1:
            dense = dense.narrow(axis, parallel.tp_rank * self.width, self.width)
        dense = dense.to(device="cpu", dtype=self._dtype)
        if shard_id == "w2":
            self._w2[local] = cpu_library.encode([dense])
        else:
            held = self._dense.setdefault(local, {})
            held[shard_id] = dense.clone()
            if len(held) == 2:
                del self._dense[local]
                self._w13[local] = cpu_library.encode([held["w1"], held["w3"]])
        for kind, found in (("w13", self._w13), ("w2", self._w2)):
            if len(found) == self._experts:
                self._joined[kind] = join([found[e] for e in range(self._experts)])
                found.clear()

    def finished(self) -> tuple[Blocks, Blocks]:
        """Gate with up, and down, of all experts of this process.

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
        return self._joined["w13"], self._joined["w2"]


def _is_complete(parts: dict[str, Tensor]) -> bool:
    """Whether all parts are there; values of three axes have no offsets."""
    fixed = "values" in parts and parts["values"].dim() == 3
    wanted = [part for part in PARTS if part != "offsets" or not fixed]
    return all(part in parts for part in wanted)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))

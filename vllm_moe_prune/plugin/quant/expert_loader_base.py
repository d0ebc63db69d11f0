"""Expert matrices as vLLM hands them over: one tensor of one expert at a time.

Tensors come whole, for all processes, in any order. vLLM's layer has an empty parameter
for each name that they go by, with our loader. D hidden, F width.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.utils import set_weight_attrs

MATRICES = ("w13", "w2")


class ExpertLoaderBase(ABC):
    """One layer's experts on their way into memory."""

    def __init__(self, layer: Any, *, experts: int, hidden: int, width: int) -> None:
        """For a layer of vLLM's.

        Args:
            layer: The layer.
            experts: Of this process.
            hidden: D.
            width: The part of F of this process.
        """
        self.hidden, self.width = hidden, width
        self._layer, self._experts = layer, experts
        self._parallel = layer.moe_config.moe_parallel_config
        self._parts: dict[tuple[int, str], dict[str, Tensor]] = {}

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
            weight_name: Ends in the name of what the tensor is of its matrix.
            shard_id: ``w1`` gate, ``w3`` up, ``w2`` down.
            expert_id: Among all experts.
            return_success: vLLM's; the answer is returned either way.

        Returns:
            Whether this process has the expert.

        Raises:
            CheckpointError: The tensor is not what its name says.
        """
        local = self._layer._map_global_expert_id_to_local_expert_id(expert_id)
        if local < 0:
            return False
        where = f"{weight_name}, expert {expert_id}, {shard_id}"
        self.take(local, shard_id, weight_name, loaded_weight, where)
        return True

    @abstractmethod
    def take(
        self, local: int, shard_id: str, name: str, tensor: Tensor, where: str
    ) -> None:
        """One tensor of an expert of this process.

        Raises:
            CheckpointError: It is not what its name says; errors begin with ``where``.
        """

    def whole_shape(self, shard_id: str) -> tuple[int, int]:
        """Of a matrix of all processes."""
        width = self.width * self._parallel.tp_size
        return (self.hidden, width) if shard_id == "w2" else (width, self.hidden)

    def own(self, shard_id: str, matrix: Tensor) -> Tensor:
        """The part of a whole matrix that is this process's, as a view."""
        if self._parallel.tp_size == 1:
            return matrix
        # Processes share F: rows of gate and up, columns of down.
        axis = 1 if shard_id == "w2" else 0
        return matrix.narrow(axis, self._parallel.tp_rank * self.width, self.width)


class ExpertMethodBase(FusedMoEMethodBase):
    """What methods have in common whose experts arrive that way."""

    @staticmethod
    def expect(
        layer: Any, loader: ExpertLoaderBase, parts: Mapping[str, torch.dtype]
    ) -> None:
        """Empty parameters of the layer for the parts of a matrix, with their loader.

        Their sizes are known when they arrive: every expert may have its own.
        """
        layer.moe_prune_loader = loader
        for matrix in MATRICES:
            for part, dtype in parts.items():
                empty = Parameter(
                    torch.empty(0, dtype=dtype, device=torch.get_default_device()),
                    requires_grad=False,
                )
                set_weight_attrs(empty, {"weight_loader": loader.load})
                layer.register_parameter(f"{matrix}_{part}", empty)

    @staticmethod
    def release(layer: Any, parts: Iterable[str]) -> None:
        """Everything has arrived: rid the layer of the loader and its parameters."""
        del layer.moe_prune_loader
        for matrix in MATRICES:
            for part in parts:
                delattr(layer, f"{matrix}_{part}")

    def get_fused_moe_quant_config(self, layer: Any) -> FusedMoEQuantConfig:
        """None of vLLM's: what runs is not its kernel for quantized experts."""
        return FusedMoEQuantConfig.make()

"""Expert matrices as vLLM hands them over: one tensor of one expert at a time.

Tensors come whole, for all processes, in any order. D hidden, F width.
"""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor


class ArrivingExperts(ABC):
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
        axis = 1 if shard_id == "w2" else 0
        return matrix.narrow(axis, self._parallel.tp_rank * self.width, self.width)

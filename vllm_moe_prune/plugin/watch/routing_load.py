"""Counts how many tokens each expert gets, inside the engine, when it is asked to.

    vllm serve OUT --additional-config '{"moe_prune_load": true}' \
        --worker-extension-cls vllm_moe_prune.plugin.watch.routing_load.RoutingLoad

The first flag switches counting on: vLLM hashes it into the names of its compiled
graphs, so that one compiled without counting is not taken for this. The second adds
methods to workers, through which the counts are read; importing this file in a worker
registers the layer that counts. Without the flags nothing of this is ever loaded.
E experts, T tokens, K slots of a token.
"""

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.models.utils import extract_layer_index

from ...errors import ServeError
from .load_op import count_routed
from .switch import SWITCH, check_supported, is_on


@MoERunner.register_oot(name="MoERunner")
class CountingMoERunner(MoERunner):
    """vLLM's MoE layer, which also counts the tokens of each expert."""

    routing_load: Tensor | None
    """Tokens per expert [E + 1] int64; the last entry is for slots that do not count.
    None while counting is off."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As ``MoERunner``; counting starts here, and over in ``start``."""
        super().__init__(*args, **kwargs)
        # Not persistent: no checkpoint has it.
        self.register_buffer("routing_load", None, persistent=False)
        self.counts_in_router = False
        vllm_config = get_current_vllm_config()
        if is_on(vllm_config):
            check_supported(vllm_config.parallel_config)
            experts = self.moe_config.num_logical_experts
            self.routing_load = torch.zeros(
                experts + 1, dtype=torch.int64, device=torch.get_default_device()
            )
            self.router.set_capture_fn(self.count)

    def count(self, topk_ids: Tensor) -> None:
        """Take what vLLM's router chose [T, K], before any load balancing."""
        count_routed(self.routing_load, topk_ids)

    def hand_over(self) -> Tensor | None:
        """The counter, for a router that knows better which slots count."""
        if self.routing_load is not None:
            self.router.set_capture_fn(None)
            self.counts_in_router = True
        return self.routing_load

    def start(self) -> None:
        """Forget what was counted while the engine warmed up.

        Raises:
            ServeError: Nothing would be counted.
        """
        kernel = type(self._quant_method).__name__
        if self._quant_method.is_monolithic:
            raise ServeError(
                f"{self.layer_name}: {kernel} routes inside its kernel, where nobody "
                f"can count; leave out {SWITCH}, or choose another --moe-backend."
            )
        if getattr(self.router, "num_fused_shared_experts", 0):
            raise ServeError(
                f"{self.layer_name}: shared experts are routed like the others here, "
                f"and cannot be told from them; leave out {SWITCH}."
            )
        capture = getattr(self.router, "capture_fn", None)
        # Not `is not`: every access makes another bound method, equal to the last.
        if not self.counts_in_router and capture != self.count:
            raise ServeError(
                f"{self.layer_name}: something else listens to its router "
                f"({capture!r}); leave out {SWITCH}, or what captures routed experts."
            )
        assert self.routing_load is not None
        self.routing_load.zero_()


class RoutingLoad:
    """Methods that vLLM adds to its workers, called by ``collective_rpc``."""

    def moe_prune_start_load(self) -> float | None:
        """Count from now on; once only.

        Returns:
            When counting began, in seconds since 1970; None: it is off.

        Raises:
            ServeError: A layer cannot be counted.
        """
        worker: Any = self
        if not is_on(worker.vllm_config):
            return None
        # Set on the worker: vLLM makes this class a base of its own.
        if not hasattr(worker, "moe_prune_since"):
            for runner in _runners(worker.get_model()):
                runner.start()
            worker.moe_prune_since = time.time()
        since: float = worker.moe_prune_since
        return since

    def moe_prune_read_load(self) -> list[tuple[int, list[int]]] | None:
        """Per layer of this process: its index, and how many tokens each expert got.

        Every process of a tensor- or expert-parallel group routes every token, so the
        first one speaks for all; the others say None.
        """
        if get_tensor_model_parallel_rank() != 0:
            return None
        worker: Any = self
        runners = list(_runners(worker.get_model()))
        if not runners:
            return []
        loads = [runner.routing_load[:-1] for runner in runners]
        counts = torch.cat(loads).tolist()  # one transfer, between two steps
        found, start = [], 0
        for runner, load in zip(runners, loads, strict=True):
            index = extract_layer_index(runner.layer_name)
            found.append((index, counts[start : start + len(load)]))
            start += len(load)
        return found

    def moe_prune_weight_bytes(self) -> int:
        """Bytes that this process holds of the model: parameters and buffers.

        What a kernel has packed into memory of its own is not seen.
        """
        worker: Any = self
        model: torch.nn.Module = worker.get_model()
        held = [*model.parameters(), *model.buffers()]
        # Tied weights and views share memory, which counts once.
        memory = {one.untyped_storage().data_ptr(): one for one in held}
        return sum(one.untyped_storage().nbytes() for one in memory.values())


def _runners(model: torch.nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if isinstance(module, MoERunner):
            # vLLM looks a layer up by its class's name: subclasses escape ours.
            if not isinstance(module, CountingMoERunner):
                raise ServeError(
                    f"{module.layer_name}: {type(module).__name__} brings a forward of "
                    f"its own, whose tokens cannot be counted; leave out {SWITCH}."
                )
            yield module

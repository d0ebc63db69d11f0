"""The quantization method ``moe_prune``: routed experts without their zeros in memory.

For any model whose experts are vLLM's ``RoutedExperts``. Selected by a compressed
checkpoint's ``quantization_config``, or by ``--quantization moe_prune`` on a dense one,
whose zeros are then left out while it loads. Everything else (attention, shared
experts, routers) stays vLLM's; in an FP8 checkpoint, its method for FP8 has that. D
hidden, F width, T tokens, K slots per token.
"""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform

from ...checkpoint.block_fp8 import SUFFIX, ScaleBlocks, read_blocks
from ...checkpoint.compressed import METHOD, PARTS, parse_storage
from ...checkpoint.module_names import CONFIG_KEY
from ...errors import ServeError
from ...kernels.blocks import Blocks
from ...kernels.cpu_encode import decode
from ..compat import chosen_experts
from .expert_loader import ExpertLoader
from .expert_loader_base import MATRICES, ExpertMethodBase
from .sparse_op import sparse_moe

log = logging.getLogger(__name__)


class MoePruneConfig(QuantizationConfig):
    """What vLLM asks a quantization method for."""

    def __init__(
        self,
        dense_layers: frozenset[int] = frozenset(),
        fp8: QuantizationConfig | None = None,
        scaled: ScaleBlocks | None = None,
    ) -> None:
        """Everything about how the checkpoint is stored.

        Args:
            dense_layers: Layers whose experts are stored dense.
            fp8: vLLM's, of an FP8 checkpoint.
            scaled: What has a scale in common there.
        """
        super().__init__()
        self.dense_layers, self.fp8, self.scaled = dense_layers, fp8, scaled

    @classmethod
    def get_name(cls) -> str:
        """As config.json and ``--quantization`` have it."""
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Types of activations, and so of weights."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """The oldest CUDA devices: those that have bf16."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: without a block in config.json, zeros are found while loading."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "MoePruneConfig":
        """From config.json's block.

        Raises:
            CheckpointError: The block is not one that this version writes.
        """
        where = "config.json"
        storage = parse_storage(config, where)
        dense_layers = frozenset(storage.dense_layers)
        dense = storage.dense_config.quantization_config
        scaled = read_blocks({CONFIG_KEY: dense}, Path(where))
        if dense is None or scaled is None:
            return cls(dense_layers)
        fp8 = get_quantization_config("fp8").from_config(dense)
        return cls(dense_layers, fp8, scaled)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Names of layers as vLLM has them."""
        if self.fp8 is not None:
            self.fp8.apply_vllm_mapper(hf_to_vllm_mapper)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Ours for routed experts, vLLM's own for everything else."""
        if isinstance(layer, RoutedExperts):
            dense = extract_layer_index(prefix) in self.dense_layers
            # vLLM's CPU kernels ignore the expert map, ours never does.
            if dense and not _splits_experts_on_cpu(layer):
                choose = partial(self._get_stock_method, layer, prefix)
                method, why = chosen_experts(choose, layer)
                if method is not None:
                    return method
                log.debug("%s: run by our kernel (vLLM: %s)", prefix, why)
            return SparseMoEMethod(layer.moe_config, self.scaled)
        return self._get_stock_method(layer, prefix)

    def _get_stock_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        if self.fp8 is not None:
            # vLLM sets it on the outer configuration only, after from_config.
            self.fp8.packed_modules_mapping = self.packed_modules_mapping
            return self.fp8.get_quant_method(layer, prefix)
        if isinstance(layer, RoutedExperts):
            return UnquantizedFusedMoEMethod(layer.moe_config)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


def _splits_experts_on_cpu(layer: RoutedExperts) -> bool:
    return bool(layer.use_ep and current_platform.is_cpu())


class SparseMoEMethod(ExpertMethodBase):
    """Routed experts as blocks of masks and values; one custom op runs a layer."""

    def __init__(self, moe: FusedMoEConfig, scaled: ScaleBlocks | None = None) -> None:
        """Refuses what no kernel here computes.

        Args:
            moe: vLLM's.
            scaled: Of FP8: what has a scale in common.

        Raises:
            ServeError: Naming the activation, or what it comes with.
        """
        super().__init__(moe)
        self.scaled = scaled
        scales = () if scaled is None else (f"weight{SUFFIX}",)
        self._suffixes = ("weight", *PARTS, *scales)
        swiglu = (moe.swiglu_limit, moe.swiglu_alpha, moe.swiglu_beta)
        clamped = swiglu != (None, None, None)
        if moe.activation != MoEActivation.SILU or moe.has_bias or clamped:
            bias = " with biases" if moe.has_bias else ""
            clamp = " clamped or scaled" if clamped else ""
            raise ServeError(
                f"quantization {METHOD}: experts with {moe.activation.value}{clamp}"
                f"{bias} are not supported, only silu without. Convert the checkpoint "
                "with `vllm-moe-prune convert --storage dense`."
            )

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Empty parameters under every name a checkpoint may bring, with our loader."""
        loader = ExpertLoader(
            layer,
            experts=num_experts,
            hidden=hidden_size,
            width=intermediate_size_per_partition,
            dtype=params_dtype,
            scaled=self.scaled,
            device=torch.get_default_device(),
        )
        dtypes = {"mask": torch.uint8, "offsets": torch.int64}
        parts = {part: dtypes.get(part, params_dtype) for part in self._suffixes}
        self.expect(layer, loader, parts)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Take over what the loader encoded, or hand over to vLLM where zeros are few.

        Raises:
            ServeError: An expert of this process was not loaded.
        """
        loader: ExpertLoader = layer.moe_prune_loader
        found = dict(zip(MATRICES, loader.finished(), strict=True))
        device = loader.device  # --cpu-offload-gb may have moved the placeholders
        self.release(layer, self._suffixes)
        nbytes = sum(blocks.nbytes for blocks in found.values())
        # FP8 stays: the method handed over to knows no scales.
        few = nbytes >= loader.dense_bytes and self.scaled is None
        if few and not _splits_experts_on_cpu(layer):
            choose = partial(UnquantizedFusedMoEMethod, self.moe)
            method, why = chosen_experts(choose, layer)
            if method is not None:
                why = _rounds_up(method, layer, loader)
            if why:
                log.debug("%s: stays compressed (vLLM: %s)", layer.layer_name, why)
            else:
                _make_dense(layer, found, loader.hidden, loader.width, device)
                layer._replace_quant_method(method)
                method.process_weights_after_loading(layer)
                return
        for name, blocks in found.items():
            parts = {
                "masks": blocks.masks_EBS,
                "starts": blocks.starts_EB1,
                "values": blocks.values,
                "scales": blocks.scales_EBC,
            }
            for part, tensor in parts.items():
                layer.register_buffer(f"{name}_{part}", tensor, persistent=False)
        layer.moe_prune_width = loader.width
        if device.type != "cpu":
            _reserve(loader, len(found["w13"].masks_EBS), self.moe.in_dtype)

    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """Run the layer [T, D]; the runner adds shared experts and other processes."""
        if layer.apply_router_weight_on_input:
            raise ServeError(
                f"quantization {METHOD}: routing weights on the input of experts are "
                "not supported."
            )
        return sparse_moe(
            x,
            topk_weights,
            topk_ids,
            layer.expert_map,
            layer.w13_masks,
            layer.w13_starts,
            layer.w13_values,
            layer.w13_scales,
            layer.w2_masks,
            layer.w2_starts,
            layer.w2_values,
            layer.w2_scales,
            layer.moe_prune_width,
        )


def _rounds_up(method: Any, layer: RoutedExperts, loader: ExpertLoader) -> str:
    """Why vLLM's method cannot take weights of these sizes over; empty: it can."""
    sizes = (loader.hidden, loader.width)
    # vLLM asks before it makes weights; ours were made of the sizes as they are.
    wanted = method.maybe_roundup_sizes(
        *sizes, layer.moe_config.in_dtype, layer.moe_config.moe_parallel_config
    )
    if wanted == sizes:
        return ""
    return f"it wants {wanted[0]} x {wanted[1]} instead of {sizes[0]} x {sizes[1]}"


def _reserve(loader: ExpertLoader, experts: int, dtype: torch.dtype) -> None:
    """Room to expand a layer in, before vLLM measures what is left of the memory."""
    from ...kernels.triton.expand import workspace_bytes  # needs Triton
    from ...kernels.triton.workspace import reserve

    reserve(workspace_bytes(experts, loader.hidden, loader.width, dtype), loader.device)


def _make_dense(
    layer: RoutedExperts,
    found: dict[str, Blocks],
    hidden: int,
    width: int,
    device: torch.device,
) -> None:
    """Weights as vLLM's own kernels want them; ``found`` is emptied on the way."""
    for name, sources, shape in (
        ("w13", 2, (width, hidden)),
        ("w2", 1, (hidden, width)),
    ):
        blocks = found.pop(name)
        dense_ENK = torch.empty(
            len(blocks.masks_EBS),
            sources * shape[0],
            shape[1],
            dtype=blocks.values.dtype,
            device=device,
        )
        if device.type == "cuda":
            from ...kernels.triton.expand import expand  # needs Triton

            every_E = torch.ones(len(dense_ENK), dtype=torch.int32, device=device)
            expand(blocks, every_E, sources, dense_ENK)
        else:
            # One expert at a time: a layer can be a good part of the memory.
            for expert, dense_NK in enumerate(dense_ENK):
                dense_NK.copy_(torch.cat(decode(blocks, expert, sources, shape)))
        parameter = Parameter(dense_ENK, requires_grad=False)
        layer.register_parameter(f"{name}_weight", parameter)

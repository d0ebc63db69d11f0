"""The quantisation method ``moe_prune``: routed experts without their zeros in memory.

For any model whose experts are vLLM's ``RoutedExperts``. Selected by a compressed
checkpoint's ``quantization_config``, or by ``--quantization moe_prune`` on a dense one,
whose zeros are then left out while it loads. Everything else (attention, shared
experts, routers) stays vLLM's. D hidden, F width, T tokens, K slots per token.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEQuantConfig,
)
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.utils import extract_layer_index
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform

from ..checkpoint.compressed import METHOD, PARTS, parse_storage
from ..errors import ServeError
from ..kernels.blocks import Blocks, decode
from .expert_loader import ExpertLoader
from .sparse_op import sparse_moe


class MoePruneConfig(QuantizationConfig):
    """What vLLM asks a quantisation method for."""

    def __init__(self, dense_layers: frozenset[int] = frozenset()) -> None:
        """Dense layers are those whose experts the checkpoint stores dense."""
        super().__init__()
        self.dense_layers = dense_layers

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
            ServeError: Its values are FP8.
        """
        storage = parse_storage(config, "config.json")
        if storage.dense_config.quantization_config is not None:
            raise ServeError(
                f"quantization {METHOD}: compressed FP8 experts cannot be served yet. "
                "Convert the checkpoint with `vllm-moe-prune convert --layout dense`."
            )
        return cls(frozenset(storage.dense_layers))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Ours for routed experts, vLLM's plain one for everything else."""
        if isinstance(layer, RoutedExperts):
            dense = extract_layer_index(prefix) in self.dense_layers
            # vLLM's CPU kernel ignores the expert map, ours never does.
            if dense and not _splits_experts_on_cpu(layer):
                return UnquantizedFusedMoEMethod(layer.moe_config)
            return SparseMoEMethod(layer.moe_config)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


def _splits_experts_on_cpu(layer: RoutedExperts) -> bool:
    return bool(layer.use_ep and current_platform.is_cpu())


class SparseMoEMethod(FusedMoEMethodBase):
    """Routed experts as blocks of masks and values; one custom op runs a layer."""

    def __init__(self, moe: FusedMoEConfig) -> None:
        """Refuses what no kernel here computes.

        Raises:
            ServeError: Naming the activation or the bias.
        """
        super().__init__(moe)
        if moe.activation != MoEActivation.SILU or moe.has_bias:
            bias = " with biases" if moe.has_bias else ""
            raise ServeError(
                f"quantization {METHOD}: experts with {moe.activation.value}{bias} are "
                "not supported, only silu without. Convert the checkpoint with "
                "`vllm-moe-prune convert --layout dense`."
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
        )
        layer.moe_prune_loader = loader
        dtypes = {"mask": torch.uint8, "offsets": torch.int64}
        for matrix in ("w13", "w2"):
            for part in ("weight", *PARTS):
                # Their sizes are known when they arrive: every expert has its own.
                empty = torch.empty(0, dtype=dtypes.get(part, params_dtype))
                parameter = Parameter(empty, requires_grad=False)
                set_weight_attrs(parameter, {"weight_loader": loader.load})
                layer.register_parameter(f"{matrix}_{part}", parameter)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Take over what the loader encoded, or hand over to vLLM where zeros are few.

        Raises:
            ServeError: An expert of this process was not loaded.
        """
        loader: ExpertLoader = layer.moe_prune_loader
        w13, w2 = loader.finished()
        del layer.moe_prune_loader
        for matrix in ("w13", "w2"):
            for part in ("weight", *PARTS):
                delattr(layer, f"{matrix}_{part}")
        few = w13.nbytes + w2.nbytes >= loader.dense_bytes
        if few and not _splits_experts_on_cpu(layer):
            _hand_over(self.moe, layer, loader, w13, w2)
            return
        device = torch.get_default_device()
        for name, blocks in (("w13", w13), ("w2", w2)):
            layer.register_buffer(
                f"{name}_masks", blocks.masks_EBS.to(device), persistent=False
            )
            layer.register_buffer(
                f"{name}_starts", blocks.starts_EB1.to(device), persistent=False
            )
            layer.register_buffer(
                f"{name}_values", blocks.values.to(device), persistent=False
            )
        layer.moe_prune_width = loader.width

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig:
        """Nothing is quantised: the values are the checkpoint's."""
        return FusedMoEQuantConfig.make()

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
            layer.w2_masks,
            layer.w2_starts,
            layer.w2_values,
            layer.moe_prune_width,
        )


def _hand_over(
    moe: FusedMoEConfig,
    layer: RoutedExperts,
    loader: ExpertLoader,
    w13: Blocks,
    w2: Blocks,
) -> None:
    """Give a layer that compression does not shrink to vLLM's own kernel."""
    hidden, width = loader.hidden, loader.width
    experts = range(len(w13.masks_EBS))
    gates_and_ups = [
        torch.cat(decode(w13, expert, 2, (width, hidden))) for expert in experts
    ]
    downs = [decode(w2, expert, 1, (hidden, width))[0] for expert in experts]
    device = torch.get_default_device()
    for name, matrices in (("w13_weight", gates_and_ups), ("w2_weight", downs)):
        stacked = torch.stack(matrices).to(device)
        layer.register_parameter(name, Parameter(stacked, requires_grad=False))
    method = UnquantizedFusedMoEMethod(moe)
    layer._replace_quant_method(method)
    method.process_weights_after_loading(layer)

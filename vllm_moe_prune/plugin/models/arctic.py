"""Snowflake Arctic, original and pruned, on vLLM's layers of today.

vLLM dropped its Arctic after 0.28.0. Embedding, attention and head are Mixtral's; the
decoder layer is a dense-MoE hybrid: beside the usual attention and MLP, with residuals
around both, experts read the *block's input* and add to its output.
Semantics: ``modeling_arctic.py`` of Snowflake/snowflake-arctic-instruct.
"""

from typing import Any

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.models.utils import WeightsMapper

from ...archs.arctic import ARCH
from ...errors import ServeError
from ..compat import wants_local_ids
from ..load.resolve_layers import check_parallel
from ..load.served_layer import ServedLayer
from .identity import Identity
from .mixtral import (
    MoePruneMixtralForCausalLM,
    MoePruneMixtralModel,
    MoePruneMixtralMoE,
    attention,
)


class ArcticMLP(nn.Module):
    """``w2(silu(w1 x) * w3 x)``, split over the tensor-parallel processes."""

    def __init__(self, width: int, vllm_config: VllmConfig, *, prefix: str) -> None:
        """Between the hidden size and ``width``."""
        super().__init__()
        config, quant_config = (
            vllm_config.model_config.hf_config,
            vllm_config.quant_config,
        )
        self.w13 = MergedColumnParallelLinear(
            config.hidden_size,
            [width] * 2,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.w13",
        )
        self.w2 = RowParallelLinear(
            width,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.w2",
        )
        self.act_fn = SiluAndMul()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[T, D] to [T, D]."""
        gate_up, _ = self.w13(hidden_states)
        output, _ = self.w2(self.act_fn(gate_up))
        return output


class ArcticDense(nn.Module):
    """The ``block_sparse_moe`` of layers that ``moe_layer_frequency`` skips."""

    def __init__(self, width: int, vllm_config: VllmConfig, *, prefix: str) -> None:
        """As wide as one expert of the original."""
        super().__init__()
        self.mlp = ArcticMLP(width, vllm_config, prefix=f"{prefix}.mlp")

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[T, D] to [T, D]."""
        return self.mlp(hidden_states)


class ArcticDecoderLayer(nn.Module):
    """One block: attention, dense MLP or experts, or both side by side."""

    def __init__(
        self, layer: ServedLayer, vllm_config: VllmConfig, *, prefix: str
    ) -> None:
        """For one layer as it is; a dropped MoE sublayer leaves with its norm."""
        super().__init__()
        config = vllm_config.model_config.hf_config

        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

        # modeling_arctic.py: only layers with experts have an MLP beside them.
        self.parallel = config.parallel_attn_mlp_res and not layer.dense
        self.self_attn = attention(vllm_config, prefix=f"{prefix}.self_attn")
        self.input_layernorm = norm()
        at = f"{prefix}.block_sparse_moe"
        self.block_sparse_moe: nn.Module | None = None
        if layer.dense:
            self.block_sparse_moe = ArcticDense(
                layer.dense_width, vllm_config, prefix=at
            )
        elif layer.has_moe:
            self.block_sparse_moe = MoePruneMixtralMoE(
                layer,
                vllm_config,
                prefix=at,
                # The published router leaves the weight of a single expert as it is.
                renormalize=layer.top_k > 1,
            )
        elif layer.norm_only:
            self.block_sparse_moe = Identity()
        if self.block_sparse_moe is not None:
            self.post_attention_layernorm = norm()
        if self.parallel:
            self.residual_layernorm = norm()
            self.residual_mlp = ArcticMLP(
                config.hidden_size, vllm_config, prefix=f"{prefix}.residual_mlp"
            )

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The block's output is the sum of the two tensors, [T, D] both."""
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        # Before anything is added to the residual: norms add in place.
        beside = None
        if self.parallel and self.block_sparse_moe is not None:
            beside = self.block_sparse_moe(self.post_attention_layernorm(residual))
        hidden_states = self.self_attn(positions, hidden_states)
        if self.parallel:
            hidden_states, residual = self.residual_layernorm(hidden_states, residual)
            hidden_states = self.residual_mlp(hidden_states)
        elif self.block_sparse_moe is not None:
            hidden_states, residual = self.post_attention_layernorm(
                hidden_states, residual
            )
            hidden_states = self.block_sparse_moe(hidden_states)
        if beside is not None:
            hidden_states = hidden_states + beside
        return hidden_states, residual


@support_torch_compile
class ArcticModel(MoePruneMixtralModel):
    """Mixtral's skeleton with Arctic's blocks."""

    layer_class = ArcticDecoderLayer
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".q_proj": (".qkv_proj", "q"),
            ".k_proj": (".qkv_proj", "k"),
            ".v_proj": (".qkv_proj", "v"),
            # Dense MLPs only: vLLM maps the experts' w1 and w3 apart.
            "_mlp.w1": ("_mlp.w13", 0),
            "_mlp.w3": ("_mlp.w13", 1),
            "_moe.mlp.w1": ("_moe.mlp.w13", 0),
            "_moe.mlp.w3": ("_moe.mlp.w13", 1),
        }
    )


class ArcticForCausalLM(MoePruneMixtralForCausalLM):
    """The original Arctic."""

    hf_to_vllm_mapper = ArcticModel.hf_to_vllm_mapper
    packed_modules_mapping = {  # noqa: RUF012  vLLM's interface
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "w13": ["w1", "w3"],
    }
    arch = ARCH
    model_class = ArcticModel

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """Refuse what today's layers would compute differently."""
        model_config = vllm_config.model_config
        config = model_config.hf_config
        if config.hidden_act != "silu":
            raise ServeError(
                f"{model_config.model}: hidden_act is {config.hidden_act!r}; Arctic is "
                "served with 'silu' only."
            )
        window = config.sliding_window
        if window is not None and window < model_config.max_model_len:
            raise ServeError(
                f"{model_config.model}: sliding_window is {window}, which is ignored "
                f"here; start with --max-model-len {window} at most."
            )
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def read_layers(self, vllm_config: VllmConfig) -> tuple[ServedLayer, ...]:
        """The layers that config.json describes."""
        layers = original_layers(vllm_config.model_config.hf_config)
        check_parallel(
            vllm_config.parallel_config, layers, local_ids=wants_local_ids(vllm_config)
        )
        return layers


class MoePruneArcticForCausalLM(ArcticForCausalLM):
    """Arctic as this package prunes it."""

    def read_layers(self, vllm_config: VllmConfig) -> tuple[ServedLayer, ...]:
        """The layers that the verified remap table describes."""
        return MoePruneMixtralForCausalLM.read_layers(self, vllm_config)


def original_layers(config: Any) -> tuple[ServedLayer, ...]:
    """Every layer of an unpruned Arctic."""
    experts, top_k = config.num_local_experts, config.num_experts_per_tok
    width = config.intermediate_size
    sparse = {"experts": experts, "router_rows": experts, "width": width}
    dense = {"experts": 0, "router_rows": 0, "dense": True, "dense_width": width}
    return tuple(
        ServedLayer(index=index, top_k=top_k, **sparse)
        # modeling_arctic.py counts from 1: at frequency 2, layers 1, 3, 5 have experts.
        if (index + 1) % config.moe_layer_frequency == 0
        else ServedLayer(index=index, top_k=top_k, **dense)
        for index in range(config.num_hidden_layers)
    )

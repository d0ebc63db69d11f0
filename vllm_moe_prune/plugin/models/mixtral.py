"""Pruned Mixtral: vLLM's Mixtral with constructors that build each layer as it is.

Only construction differs: per-layer expert counts, absent MoE sublayers, redirected
routing. Every forward but that of a layer without MoE, and everything about attention,
parallelism, LoRA and quantization, is vLLM's. vLLM imports this file by name.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_ep_group
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, GateLinear
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.mixtral import (
    MixtralAttention,
    MixtralDecoderLayer,
    MixtralForCausalLM,
    MixtralModel,
    MixtralMoE,
)
from vllm.model_executor.models.utils import (
    PPMissingLayer,
    WeightsMapper,
    extract_layer_index,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)

from ...archs.mixtral import ARCH
from ..load.load_check import first_load_check, load_counted
from ..load.packed import one_by_one
from ..load.resolve_layers import read_layers
from ..load.served_layer import ServedLayer
from .identity import Identity
from .moe_parts import connect_rows, count_experts, row_table
from .routing import route_rows

# vLLM reads the Hub's per-expert names; these add the other spellings of the table. As
# endings they meet modules in lists; vLLM's own mapper has them for weights.
MAPPER = WeightsMapper(
    orig_to_new_substr={".mlp.": ".block_sparse_moe."},
    orig_to_new_suffix={".gate_proj": ".w1", ".up_proj": ".w3", ".down_proj": ".w2"},
)


class MoePruneMixtralMoE(MixtralMoE):
    """MixtralMoE with one layer's experts and, where needed, our routing."""

    def __init__(
        self,
        layer: ServedLayer,
        vllm_config: VllmConfig,
        *,
        prefix: str,
        renormalize: bool = True,
    ) -> None:
        """Like ``MixtralMoE``; router rows need not be as many as experts."""
        # Not MixtralMoE's own: it reads one global number of experts.
        nn.Module.__init__(self)
        config = vllm_config.model_config.hf_config
        self.hidden_size = config.hidden_size
        count_experts(self, layer, vllm_config)
        self.gate = GateLinear(
            config.hidden_size, layer.router_rows, prefix=f"{prefix}.gate"
        )
        self.rows = row_table(self, layer, vllm_config)
        self.experts = FusedMoEFactory(
            num_experts=layer.experts,
            top_k=layer.top_k,
            hidden_size=config.hidden_size,
            intermediate_size=layer.width,
            renormalize=renormalize,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.experts",
            custom_routing_function=None if self.rows is None else self._route,
            enable_eplb=self.enable_eplb,
            num_redundant_experts=self.n_redundant_experts,
            # In vLLM's order: gate, down, up.
            ckpt_names=("w1", "w2", "w3"),
        )
        connect_rows(self, vllm_config)

    def _route(
        self,
        hidden_states: torch.Tensor,
        gating_output: torch.Tensor,
        topk: int,
        renormalize: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # The signature is vLLM's for a custom_routing_function.
        assert self.rows is not None
        return route_rows(gating_output, self.rows, top_k=topk, renormalize=renormalize)


class MoePruneMixtralDecoderLayer(MixtralDecoderLayer):
    """MixtralDecoderLayer that may lack its MoE sublayer and the norm before it."""

    def __init__(
        self, layer: ServedLayer, vllm_config: VllmConfig, *, prefix: str
    ) -> None:
        """Like ``MixtralDecoderLayer``, for one layer as it was cut."""
        nn.Module.__init__(self)
        config = vllm_config.model_config.hf_config
        self.hidden_size = config.hidden_size
        self.self_attn = attention(vllm_config, prefix=f"{prefix}.self_attn")
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        # vLLM's forward calls both; Identity hands the residual on unchanged.
        self.block_sparse_moe: nn.Module = Identity()
        self.post_attention_layernorm: nn.Module = Identity()
        if layer.has_moe:
            self.block_sparse_moe = MoePruneMixtralMoE(
                layer, vllm_config, prefix=f"{prefix}.block_sparse_moe"
            )
        if layer.has_moe or layer.norm_only:
            self.post_attention_layernorm = RMSNorm(
                config.hidden_size, eps=config.rms_norm_eps
            )


def attention(vllm_config: VllmConfig, *, prefix: str) -> MixtralAttention:
    """vLLM's Mixtral attention, built from the configuration alone."""
    config = vllm_config.model_config.hf_config
    return MixtralAttention(
        config=config,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        max_position=config.max_position_embeddings,
        num_kv_heads=config.num_key_value_heads,
        cache_config=vllm_config.cache_config,
        quant_config=vllm_config.quant_config,
        prefix=prefix,
    )


@support_torch_compile
class MoePruneMixtralModel(MixtralModel):
    """MixtralModel that builds each decoder layer from its own description."""

    hf_to_vllm_mapper = MAPPER | MixtralModel.hf_to_vllm_mapper
    layer_class: type[nn.Module] = MoePruneMixtralDecoderLayer

    def __init__(
        self,
        *,
        vllm_config: VllmConfig,
        layers: Sequence[ServedLayer],
        prefix: str = "",
    ) -> None:
        """Like ``MixtralModel``."""
        nn.Module.__init__(self)
        config = vllm_config.model_config.hf_config
        parallel_config = vllm_config.parallel_config
        self.config = config
        self.quant_config = vllm_config.quant_config
        self.vocab_size = config.vocab_size
        self.org_vocab_size = config.vocab_size
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size
        )
        self.enable_eplb = parallel_config.enable_eplb
        self.num_redundant_experts = parallel_config.eplb_config.num_redundant_experts

        def build(prefix: str) -> nn.Module:
            layer = layers[extract_layer_index(prefix)]
            return self.layer_class(layer, vllm_config, prefix=prefix)

        self.start_layer, self.end_layer, self.layers = make_layers(
            len(layers), build, prefix=f"{prefix}.layers"
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], config.hidden_size
        )


class MoePruneMixtralForCausalLM(MixtralForCausalLM):
    """MixtralForCausalLM for checkpoints pruned by this package."""

    hf_to_vllm_mapper = MoePruneMixtralModel.hf_to_vllm_mapper
    arch = ARCH
    model_class = MoePruneMixtralModel

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """Like ``MixtralForCausalLM``, after the checkpoint has been verified."""
        nn.Module.__init__(self)
        config = vllm_config.model_config.hf_config
        layers = self.read_layers(vllm_config)
        self.config = config
        self.quant_config = vllm_config.quant_config
        self.model = self.model_class(
            vllm_config=vllm_config,
            layers=layers,
            prefix=maybe_prefix(prefix, "model"),
        )
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if config.tie_word_embeddings:
            # Tied heads have no tensor of their own to load.
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = (
            self.model.make_empty_intermediate_tensors
        )
        self._describe_experts(layers, vllm_config)
        self.load_check = first_load_check(self.arch, layers, vllm_config)

    def read_layers(self, vllm_config: VllmConfig) -> tuple[ServedLayer, ...]:
        """The layers to build, of a checkpoint that was verified."""
        return read_layers(vllm_config, self.arch)

    def _describe_experts(
        self, layers: Sequence[ServedLayer], vllm_config: VllmConfig
    ) -> None:
        # vLLM's MixtureOfExperts interface; EPLB alone reads the counts, and it is
        # refused where layers differ, so the largest layer stands for all.
        self.moe_layers: list[Any] = [
            layer.block_sparse_moe.experts
            for layer in self.model.layers
            if not isinstance(layer, PPMissingLayer)
            and isinstance(layer.block_sparse_moe, MixtralMoE)
        ]
        self.num_moe_layers = len(self.moe_layers)
        experts = max(layer.experts for layer in layers)
        redundant = vllm_config.parallel_config.eplb_config.num_redundant_experts
        self.num_logical_experts = self.num_routed_experts = experts
        self.num_physical_experts = experts + redundant
        self.num_local_physical_experts = (
            self.num_physical_experts // get_ep_group().world_size
        )
        self.num_redundant_experts = redundant
        self.num_expert_groups = 1
        self.num_shared_experts = 0

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load; the first time, demand every expert exactly once."""
        load = super().load_weights
        return load_counted(
            self, lambda each: load(one_by_one(each, "w1", "w3", "w2")), weights
        )

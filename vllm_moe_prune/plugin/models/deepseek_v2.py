"""Pruned DeepSeek-V2: vLLM's DeepSeek with constructors that build each layer as it is.

Only construction differs: per-layer expert counts, absent MoE sublayers, redirected
routing, groups of unequal size. Every forward is vLLM's. DeepSeek-MoE and DeepSeek-V3
are the same classes with another table (``deepseek.py``, ``deepseek_v3.py``).
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, GateLinear
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.deepseek_v2 import (
    DeepseekAttention,
    DeepseekV2Attention,
    DeepseekV2DecoderLayer,
    DeepseekV2ForCausalLM,
    DeepseekV2MLAAttention,
    DeepseekV2MLP,
    DeepseekV2Model,
    DeepseekV2MoE,
)
from vllm.model_executor.models.utils import (
    PPMissingLayer,
    extract_layer_index,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.platforms import current_platform

from ...archs.deepseek_v2 import ARCH
from ...archs.spec import MoeArch, RouterRule
from ..load.load_check import first_load_check, load_counted
from ..load.packed import one_by_one
from ..load.resolve_layers import read_layers, rule_of
from ..load.served_layer import ServedLayer
from .identity import Identity
from .moe_parts import connect_rows, count_experts, row_table
from .routing import route_rows


class MoePruneDeepseekV2MoE(DeepseekV2MoE):
    """DeepseekV2MoE with one layer's experts and, where needed, our routing."""

    def __init__(
        self,
        layer: ServedLayer,
        rule: RouterRule,
        vllm_config: VllmConfig,
        *,
        biased: bool,
        prefix: str,
    ) -> None:
        """Like ``DeepseekV2MoE``; router rows need not be as many as experts."""
        # Not DeepseekV2MoE's own: it reads one global number of experts.
        nn.Module.__init__(self)
        config = vllm_config.model_config.hf_config
        self.tp_size = get_tensor_model_parallel_world_size()
        self.tp_rank = get_tensor_model_parallel_rank()
        self.routed_scaling_factor = rule.scale
        count_experts(self, layer, vllm_config)
        self.n_shared_experts = config.n_shared_experts
        self.is_sequence_parallel = (
            vllm_config.parallel_config.use_sequence_parallel_moe
        )
        # vLLM's own switch for the gate's dtype.
        fp32 = getattr(config, "moe_router_dtype", None) == "float32"
        self.router_dtype = torch.float32 if fp32 else None
        self.gate = GateLinear(
            config.hidden_size,
            layer.router_rows,
            out_dtype=self.router_dtype,
            prefix=f"{prefix}.gate",
        )
        self.gate.e_score_correction_bias = (
            nn.Parameter(
                # fp32 whatever the model's dtype, as vLLM's: it decides close choices.
                torch.empty(
                    layer.router_rows,
                    dtype=torch.float32,
                    device=torch.get_default_device(),
                )
            )
            if biased
            else None
        )
        # AMD's fused paths bring routers of their own; none of them is used.
        self.is_rocm_aiter_moe_enabled = False
        self.is_fused_shared_expert_enabled = False
        self.shared_experts = None
        if layer.shared_width:
            self.shared_experts = DeepseekV2MLP(
                hidden_size=config.hidden_size,
                intermediate_size=layer.shared_width,
                hidden_act=config.hidden_act,
                quant_config=vllm_config.quant_config,
                is_sequence_parallel=self.is_sequence_parallel,
                # The runner reduces it, together with the routed output where it can.
                reduce_results=False,
                prefix=f"{prefix}.shared_experts",
            )
        self.rule = rule
        # A table only where rows are not experts; else vLLM's own routing runs.
        self.rows = row_table(self, layer, vllm_config)
        routed = self.rows is not None
        self.experts = FusedMoEFactory(
            shared_experts=self.shared_experts,
            gate=self.gate,
            num_experts=layer.experts,
            top_k=layer.top_k,
            hidden_size=config.hidden_size,
            intermediate_size=layer.width,
            renormalize=rule.renormalize,
            quant_config=vllm_config.quant_config,
            use_grouped_topk=not routed,
            num_expert_group=rule.groups,
            topk_group=rule.top_groups,
            # vLLM's grouped top-k reshapes rows to [groups, rows / groups]: equal
            # groups only.
            custom_routing_function=self._route if routed else None,
            prefix=f"{prefix}.experts",
            scoring_func=rule.scores,
            # To the output: vLLM's routers do not all scale, its runner always does.
            routed_scaling_factor=rule.scale,
            apply_routed_scale_to_output=True,
            # Our routing adds the bias itself; vLLM's would add it a second time.
            e_score_correction_bias=None
            if routed
            else self.gate.e_score_correction_bias,
            enable_eplb=self.enable_eplb,
            num_redundant_experts=self.n_redundant_experts,
            is_sequence_parallel=self.is_sequence_parallel,
            router_logits_dtype=self.gate.out_dtype,
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
        return route_rows(
            gating_output,
            self.rows,
            top_k=topk,
            renormalize=renormalize,
            sigmoid=self.rule.scores == "sigmoid",
            bias_R=self.gate.e_score_correction_bias,
            top_groups=self.rule.top_groups,
        )


class MoePruneDeepseekV2DecoderLayer(DeepseekV2DecoderLayer):
    """DeepseekV2DecoderLayer that may lack its MoE sublayer and the norm before it."""

    def __init__(
        self,
        layer: ServedLayer,
        rule: RouterRule,
        vllm_config: VllmConfig,
        *,
        biased: bool,
        prefix: str,
    ) -> None:
        """Like ``DeepseekV2DecoderLayer``, for one layer as it was cut."""
        nn.Module.__init__(self)
        config = vllm_config.model_config.hf_config
        parallel_config = vllm_config.parallel_config
        self.hidden_size = config.hidden_size
        self.layer_idx = layer.index
        # vLLM's forward divides fp16 activations by it, against overflow.
        self.routed_scaling_factor = rule.scale
        self.use_mha = uses_mha(config)
        self.use_sequence_parallel_moe = (
            layer.has_moe
            and parallel_config.use_sequence_parallel_moe
            # As vLLM: stages cannot hand over sequence-parallel hidden states yet.
            and parallel_config.pipeline_parallel_size == 1
        )
        self.self_attn = _attention(
            vllm_config,
            reduce_results=not self.use_sequence_parallel_moe,
            prefix=f"{prefix}.self_attn",
        )
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        # vLLM's forward calls both; Identity hands the residual on unchanged.
        self.mlp: nn.Module = Identity()
        self.post_attention_layernorm: nn.Module = Identity()
        if layer.has_moe:
            self.mlp = MoePruneDeepseekV2MoE(
                layer, rule, vllm_config, biased=biased, prefix=f"{prefix}.mlp"
            )
        elif layer.dense:
            self.mlp = DeepseekV2MLP(
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                hidden_act=config.hidden_act,
                quant_config=vllm_config.quant_config,
                prefix=f"{prefix}.mlp",
            )
        if layer.has_moe or layer.dense or layer.norm_only:
            self.post_attention_layernorm = RMSNorm(
                config.hidden_size, eps=config.rms_norm_eps
            )


def uses_mha(config: Any) -> bool:
    """Whether attention is that of DeepSeek-MoE, with keys and values as in Llama."""
    sizes = ("qk_nope_head_dim", "qk_rope_head_dim")
    return config.model_type == "deepseek" or not any(
        getattr(config, size, 0) for size in sizes
    )


def _attention(
    vllm_config: VllmConfig, *, reduce_results: bool, prefix: str
) -> nn.Module:
    config = vllm_config.model_config.hf_config
    same = {
        "vllm_config": vllm_config,
        "config": config,
        "hidden_size": config.hidden_size,
        "num_heads": config.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "cache_config": vllm_config.cache_config,
        "quant_config": vllm_config.quant_config,
        "reduce_results": reduce_results,
        "prefix": prefix,
    }
    if uses_mha(config):
        return DeepseekAttention(**same)
    use_mla = vllm_config.model_config.use_mla
    latent = DeepseekV2MLAAttention if use_mla else DeepseekV2Attention
    return latent(
        **same,
        qk_nope_head_dim=config.qk_nope_head_dim,
        qk_rope_head_dim=config.qk_rope_head_dim,
        v_head_dim=config.v_head_dim,
        q_lora_rank=config.q_lora_rank,
        kv_lora_rank=config.kv_lora_rank,
    )


@support_torch_compile
class MoePruneDeepseekV2Model(DeepseekV2Model):
    """DeepseekV2Model that builds each decoder layer from its own description."""

    def __init__(
        self,
        *,
        vllm_config: VllmConfig,
        layers: Sequence[ServedLayer],
        arch: MoeArch,
        prefix: str = "",
    ) -> None:
        """Like ``DeepseekV2Model``."""
        nn.Module.__init__(self)
        config = vllm_config.model_config.hf_config
        # Groups and scaling as the original had them, not as counts would suggest.
        rule = rule_of(vllm_config.model_config, arch)
        biased = any(layout.rule("router_bias") for layout in arch.layouts)
        # vLLM's loader maps as many experts as this says, so the largest layer's.
        largest = max(layers, key=lambda layer: layer.experts)
        self.config = config.per_layer_config[largest.index]
        self.device = current_platform.device_type
        self.hidden_size = config.hidden_size
        self.vocab_size = config.vocab_size
        self.is_v32 = False
        self.embed_tokens: nn.Module = PPMissingLayer()
        # Other pipeline stages must not allocate what they never use.
        if get_pp_group().is_first_rank:
            self.embed_tokens = VocabParallelEmbedding(
                config.vocab_size,
                config.hidden_size,
                quant_config=vllm_config.quant_config,
                prefix=f"{prefix}.embed_tokens",
            )

        def build(prefix: str) -> nn.Module:
            layer = layers[extract_layer_index(prefix)]
            return MoePruneDeepseekV2DecoderLayer(
                layer, rule, vllm_config, biased=biased, prefix=prefix
            )

        self.start_layer, self.end_layer, self.layers = make_layers(
            len(layers), build, prefix=f"{prefix}.layers"
        )
        self.is_fused_shared_expert_enabled = False
        self.norm: nn.Module = PPMissingLayer()
        if get_pp_group().is_last_rank:
            self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], config.hidden_size
        )
        self.aux_hidden_state_layers = ()
        self.use_mha = uses_mha(config)
        self.num_redundant_experts = (
            vllm_config.parallel_config.eplb_config.num_redundant_experts
        )


class MoePruneDeepseekV2ForCausalLM(DeepseekV2ForCausalLM):
    """DeepseekV2ForCausalLM for checkpoints pruned by this package."""

    arch = ARCH
    # vLLM reads it from the class, and adds to it when it knows the attention.
    packed_modules_mapping: dict[str, list[str]] = {  # noqa: RUF012
        "gate_up_proj": ["gate_proj", "up_proj"]
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """Like ``DeepseekV2ForCausalLM``, after the checkpoint has been verified."""
        nn.Module.__init__(self)
        config = vllm_config.model_config.hf_config
        layers = read_layers(vllm_config, self.arch)
        self.quant_config = vllm_config.quant_config
        self.use_mha = uses_mha(config)
        self.fuse_qkv_a_proj = getattr(config, "q_lora_rank", None) is not None
        if self.use_mha:
            self.packed_modules_mapping["qkv_proj"] = ["q_proj", "k_proj", "v_proj"]
        if self.fuse_qkv_a_proj:
            self.packed_modules_mapping["fused_qkv_a_proj"] = [
                "q_a_proj",
                "kv_a_proj_with_mqa",
            ]
        self.model = MoePruneDeepseekV2Model(
            vllm_config=vllm_config,
            layers=layers,
            arch=self.arch,
            prefix=maybe_prefix(prefix, "model"),
        )
        self.config = self.model.config
        self.lm_head: nn.Module = PPMissingLayer()
        if get_pp_group().is_last_rank:
            self.lm_head = ParallelLMHead(
                config.vocab_size,
                config.hidden_size,
                quant_config=vllm_config.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = (
            self.model.make_empty_intermediate_tensors
        )
        self.set_moe_parameters()
        # set_moe_parameters found those that are left, not those config.json counts.
        self.num_moe_layers = len(self.moe_layers)
        self.load_check = first_load_check(self.arch, layers, vllm_config)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load; the first time, demand every expert exactly once."""
        load = super().load_weights
        names = ("gate_proj", "up_proj", "down_proj")
        return load_counted(self, lambda each: load(one_by_one(each, *names)), weights)

"""A trainable Snowflake Arctic, which transformers does not have.

Mixtral's model with Arctic's decoder layer, written from the published description: the
experts read the normed *input* of the layer, while a dense residual MLP reads what
attention gives. Checkpoints are saved and loaded under the published names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig
from transformers.activations import ACT2FN
from transformers.models.mixtral.modeling_mixtral import (
    MixtralDecoderLayer,
    MixtralForCausalLM,
    MixtralRMSNorm,
)

KEYS = (
    *("attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("hidden_act", "hidden_size", "intermediate_size", "initializer_range"),
    *("max_position_embeddings", "moe_layer_frequency", "num_attention_heads"),
    *("num_experts_per_tok", "num_hidden_layers", "num_key_value_heads"),
    *("num_local_experts", "parallel_attn_mlp_res", "rms_norm_eps"),
    *("router_aux_loss_coef", "tie_word_embeddings", "use_cache", "use_residual"),
    *("vocab_size",),
)
PUBLISHED = ("block_sparse_moe.gate", "block_sparse_moe.experts")


class ArcticConfig(MixtralConfig):
    """The published field names; only what the demonstration needs is looked at."""

    model_type = "arctic"
    moe_layer_frequency: int = 1
    parallel_attn_mlp_res: bool = True
    use_residual: bool = True


class ArcticMLP(nn.Module):
    """w1 = gate, w3 = up, w2 = down; as wide as the hidden state."""

    def __init__(self, config: ArcticConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.w1 = nn.Linear(size, size, bias=False)
        self.w2 = nn.Linear(size, size, bias=False)
        self.w3 = nn.Linear(size, size, bias=False)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x_STD: torch.Tensor) -> torch.Tensor:
        out_STD: torch.Tensor = self.w2(self.act(self.w1(x_STD)) * self.w3(x_STD))
        return out_STD


class ArcticDecoderLayer(MixtralDecoderLayer):
    """Attention, then the residual MLP; beside both, the experts."""

    def __init__(self, config: ArcticConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        size, eps = config.hidden_size, config.rms_norm_eps
        self.residual_layernorm = MixtralRMSNorm(size, eps=eps)
        self.residual_mlp = ArcticMLP(config)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        entered_STD = hidden_states
        attention_STD, _ = self.self_attn(
            hidden_states=self.input_layernorm(entered_STD), **kwargs
        )
        out_STD = entered_STD + attention_STD
        out_STD = out_STD + self.residual_mlp(self.residual_layernorm(out_STD))
        experts_STD: torch.Tensor = self.mlp(self.post_attention_layernorm(entered_STD))
        return out_STD + experts_STD


class ArcticForCausalLM(MixtralForCausalLM):
    """The whole model, saved and loaded as it was published."""

    config_class = ArcticConfig
    # The experts are Mixtral's, which transformers cannot see from this file.
    _can_set_experts_implementation_cached_value = True

    def __init__(self, config: ArcticConfig) -> None:
        super().__init__(config)
        self.model.layers = nn.ModuleList(
            ArcticDecoderLayer(config, index)
            for index in range(config.num_hidden_layers)
        )
        self.post_init()

    def save_pretrained(self, out: Path, max_shard_size: str = "5GB") -> None:
        """Weights, config and generation config."""
        tensors = published(self.state_dict())
        save_torch_state_dict(tensors, out, max_shard_size=max_shard_size)
        config = {key: getattr(self.config, key) for key in KEYS} | {
            "architectures": ["ArcticForCausalLM"],
            "model_type": "arctic",
            "rope_theta": self.config.rope_parameters["rope_theta"],
            "torch_dtype": "bfloat16",
        }
        text = json.dumps(config, indent=2, sort_keys=True)
        (Path(out) / "config.json").write_text(text + "\n", encoding="utf-8")
        self.generation_config.save_pretrained(out)

    @classmethod
    def from_pretrained(cls, out: Path, **_: Any) -> ArcticForCausalLM:
        """The model of a folder that ``save_pretrained`` wrote."""
        model = cls(ArcticConfig.from_pretrained(out)).to(torch.bfloat16)
        tensors: dict[str, torch.Tensor] = {}
        for path in sorted(Path(out).glob("*.safetensors")):
            tensors |= load_file(path)
        model.load_state_dict(packed(tensors, model.config.num_local_experts))
        return model


def published(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Packed experts as one matrix each, under the published names."""
    tensors = {}
    for name, tensor in state.items():
        if ".mlp.experts." not in name:
            renamed = name.replace(".mlp.gate", f".{PUBLISHED[0]}")
            tensors[renamed] = tensor.contiguous()
            continue
        prefix, _, kind = name.replace(".mlp.experts", f".{PUBLISHED[1]}").rpartition(
            "."
        )
        for expert, matrix in enumerate(tensor):
            parts = {"w2": matrix}
            if kind == "gate_up_proj":
                parts = dict(zip(("w1", "w3"), matrix.chunk(2), strict=True))
            for part, weight in parts.items():
                tensors[f"{prefix}.{expert}.{part}.weight"] = weight.clone()
    return tensors


def packed(tensors: dict[str, torch.Tensor], experts: int) -> dict[str, torch.Tensor]:
    """The inverse of ``published``."""
    state = {}
    for name, tensor in tensors.items():
        if f".{PUBLISHED[1]}." not in name:
            state[name.replace(f".{PUBLISHED[0]}", ".mlp.gate")] = tensor
        elif name.endswith(".experts.0.w2.weight"):
            prefix = name.removesuffix("0.w2.weight")
            renamed = prefix.replace(PUBLISHED[1], "mlp.experts")

            def stacked(part: str, prefix: str = prefix) -> torch.Tensor:
                names = (f"{prefix}{expert}.{part}.weight" for expert in range(experts))
                return torch.stack([tensors[each] for each in names])

            state[f"{renamed}down_proj"] = stacked("w2")
            gate_up = torch.cat([stacked("w1"), stacked("w3")], dim=1)
            state[f"{renamed}gate_up_proj"] = gate_up
    return state


AutoConfig.register("arctic", ArcticConfig, exist_ok=True)
AutoModelForCausalLM.register(ArcticConfig, ArcticForCausalLM, exist_ok=True)

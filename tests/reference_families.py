"""Arctic and DeepSeek forwards written down again without the package.

Plain torch in float64, straight from the safetensors files and the config, token by
token where routing is concerned. Nothing is removed: experts that a plan drops get the
logit minus infinity (or, where scores are sigmoids, are never chosen), so that cutting
them out must give the same.

Axes: S sequences, T tokens, D hidden, H heads, d head size, V vocabulary.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tests.reference import Ids, read_json, read_tensors

DEEPSEEKS = ("deepseek", "deepseek_v2", "deepseek_v3")


@dataclass(frozen=True)
class Removed:
    """What a plan takes away; the default is nothing."""

    keep: Mapping[int, Ids] = field(default_factory=dict)
    """Layer -> the experts that are left."""
    moe: Ids = ()
    """Layers whose MoE sublayer goes, its norm and shared experts with it."""
    blocks: Ids = ()
    redirect: Mapping[int, Mapping[int, int | None]] = field(default_factory=dict)
    """Layer -> removed expert -> the one that serves it, or nobody."""


class FamilyReference:
    """One checkpoint in float64."""

    def __init__(self, folder: Path, removed: Removed | None = None) -> None:
        self.config: dict[str, Any] = read_json(folder / "config.json")
        self.removed = removed or Removed()
        self.tensors = read_tensors(folder)
        self.family = self.config["model_type"]
        self.loads: dict[int, Counter[int]] = {}
        """Layer -> expert -> routed slots, of all tokens so far."""

    def weight(self, name: str) -> Tensor:
        """A matrix as the model computes with it."""
        tensor = self.tensors[name].double()
        scale = self.tensors.get(f"{name}_scale_inv")
        if scale is None:
            return tensor
        rows, cols = self.config["quantization_config"]["weight_block_size"]
        for row in range(scale.shape[0]):
            for col in range(scale.shape[1]):
                block = (
                    slice(row * rows, (row + 1) * rows),
                    slice(col * cols, (col + 1) * cols),
                )
                tensor[block] *= scale[row, col].double()
        return tensor

    def logits(self, ids_ST: Tensor) -> Tensor:
        """Logits [S, T, V]."""
        hidden_STD = functional.embedding(
            ids_ST, self.weight("model.embed_tokens.weight")
        )
        for layer in range(self.config["num_hidden_layers"]):
            if layer not in self.removed.blocks:
                hidden_STD = self.layer(layer, hidden_STD)
        hidden_STD = self.norm("model.norm.weight", hidden_STD)
        return hidden_STD @ self.weight("lm_head.weight").T

    def loss(self, ids_ST: Tensor) -> float:
        """Mean loss of the tokens 1 to T - 1."""
        logits = self.logits(ids_ST)[:, :-1].flatten(0, 1)
        return float(functional.cross_entropy(logits, ids_ST[:, 1:].flatten()))

    def mtp_loss(self, ids_ST: Tensor) -> float:
        """Mean loss of the tokens 2 to T - 1, as the first MTP layer predicts them."""
        layer = self.config["num_hidden_layers"]
        at = f"model.layers.{layer}."
        hidden_STD = functional.embedding(
            ids_ST, self.weight("model.embed_tokens.weight")
        )
        for index in range(layer):
            hidden_STD = self.layer(index, hidden_STD)
        last = self.norm("model.norm.weight", hidden_STD)[:, :-1]
        following = functional.embedding(
            ids_ST[:, 1:], self.weight(at + "embed_tokens.weight")
        )
        both = (
            self.norm(at + "enorm.weight", following),
            self.norm(at + "hnorm.weight", last),
        )
        x_STD = torch.cat(both, -1) @ self.weight(at + "eh_proj.weight").T
        out = self.norm(at + "shared_head.norm.weight", self.layer(layer, x_STD))
        logits = out @ self.weight(at + "shared_head.head.weight").T
        targets = ids_ST[:, 2:].flatten()
        return float(functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets))

    def norm(self, name: str, x: Tensor, eps: float | None = None) -> Tensor:
        eps = self.config.get("rms_norm_eps", 1e-5) if eps is None else eps
        return self.weight(name) * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()

    def layer(self, layer: int, x_STD: Tensor) -> Tensor:
        at = f"model.layers.{layer}."
        attention = self.mla if "kv_lora_rank" in self.config else self.gqa
        normed = self.norm(at + "input_layernorm.weight", x_STD)
        h_STD = x_STD + attention(at + "self_attn.", normed)
        if self.family == "arctic":
            return self.arctic_mlp(layer, at, x_STD, h_STD)
        if layer in self.removed.moe:
            return h_STD
        normed = self.norm(at + "post_attention_layernorm.weight", h_STD)
        if not self.has_moe(layer):
            return h_STD + self.mlp(at + "mlp.", normed)
        block = "block_sparse_moe." if self.family == "minimax_m2" else "mlp."
        out = self.experts(layer, at + block, normed)
        if self.family == "qwen2_moe":
            shared = self.mlp(at + "mlp.shared_expert.", normed)
            weigher = self.weight(at + "mlp.shared_expert_gate.weight")
            return h_STD + out + (normed @ weigher.T).sigmoid() * shared
        if not self.config.get("n_shared_experts"):
            return h_STD + out
        return h_STD + out + self.mlp(at + "mlp.shared_experts.", normed)

    def arctic_mlp(self, layer: int, at: str, x_STD: Tensor, h_STD: Tensor) -> Tensor:
        parallel = self.config["parallel_attn_mlp_res"] and self.has_moe(layer)
        out_STD = h_STD
        if parallel:
            normed = self.norm(at + "residual_layernorm.weight", h_STD)
            out_STD = h_STD + self.mlp(at + "residual_mlp.", normed, "w1", "w3", "w2")
        if layer in self.removed.moe:
            return out_STD
        read = x_STD if parallel else h_STD
        normed = self.norm(at + "post_attention_layernorm.weight", read)
        at += "block_sparse_moe."
        if not self.has_moe(layer):
            return out_STD + self.mlp(at + "mlp.", normed, "w1", "w3", "w2")
        return out_STD + self.experts(layer, at, normed)

    def has_moe(self, layer: int) -> bool:
        config = self.config
        if self.family in ("olmoe", "minimax_m2"):
            return True
        if self.family in ("qwen2_moe", "qwen3_moe"):
            return (layer + 1) % config["decoder_sparse_step"] == 0
        if self.family == "arctic":
            return (layer + 1) % config["moe_layer_frequency"] == 0
        return (
            layer >= config["first_k_dense_replace"]
            and layer % config.get("moe_layer_freq", 1) == 0
        )

    def mlp(
        self, at: str, x: Tensor, gate="gate_proj", up="up_proj", down="down_proj"
    ) -> Tensor:
        inner = functional.silu(x @ self.weight(f"{at}{gate}.weight").T)
        return (inner * (x @ self.weight(f"{at}{up}.weight").T)) @ self.weight(
            f"{at}{down}.weight"
        ).T

    def experts(self, layer: int, at: str, x_STD: Tensor) -> Tensor:
        mixtral = self.family in ("arctic", "minimax_m2")
        names = ("w1", "w3", "w2") if mixtral else ()
        x_ND = x_STD.flatten(0, 1)
        logits_NE = x_ND @ self.weight(at + "gate.weight").T
        out_ND = torch.zeros_like(x_ND)
        outputs: dict[int, Tensor] = {}
        for token in range(len(x_ND)):
            for expert, weight in self.choose(layer, at, logits_NE[token]):
                target = self.removed.redirect.get(layer, {}).get(expert, expert)
                if target is None:
                    continue
                self.loads.setdefault(layer, Counter())[target] += 1
                if target not in outputs:
                    outputs[target] = self.mlp(f"{at}experts.{target}.", x_ND, *names)
                out_ND[token] += weight * outputs[target][token]
        return out_ND.view_as(x_STD)

    def choose(self, layer: int, at: str, logits_E: Tensor) -> list[tuple[int, float]]:
        """The experts of one token, with their weights."""
        config, count = self.config, len(logits_E)
        left = set(self.removed.keep.get(layer, range(count)))
        top_k = min(config["num_experts_per_tok"], len(left))
        glm = self.family.startswith("glm4_moe")
        if glm or config.get("scoring_func") == "sigmoid":
            scores = [float(logit.sigmoid()) for logit in logits_E]
        else:
            gone = torch.tensor([expert not in left for expert in range(count)])
            masked = logits_E.masked_fill(gone, -math.inf)
            scores = masked.softmax(-1).tolist()
        gate = "" if self.family == "minimax_m2" else "gate."
        bias = self.tensors.get(f"{at}{gate}e_score_correction_bias")
        choice = {
            expert: scores[expert] + (0.0 if bias is None else float(bias[expert]))
            for expert in left
        }
        groups = config.get("n_group") or 1
        if groups > 1 and config.get("topk_method") != "greedy":
            best = 2 if bias is not None else 1
            size = count // groups
            totals = {
                group: sum(
                    sorted(
                        (choice[expert] for expert in left if expert // size == group),
                        reverse=True,
                    )[:best]
                )
                for group in range(groups)
            }
            chosen = sorted(totals, key=lambda group: -totals[group])
            chosen = chosen[: config["topk_group"]]
            choice = {
                expert: value
                for expert, value in choice.items()
                if expert // size in chosen
            }
        ids = sorted(choice, key=lambda expert: -choice[expert])[:top_k]
        weights = [scores[expert] for expert in ids]
        several = config["num_experts_per_tok"] > 1
        always = self.family == "minimax_m2" or (self.family == "arctic" and several)
        if always or config.get("norm_topk_prob"):
            weights = [weight / sum(weights) for weight in weights]
        scale = config.get("routed_scaling_factor", 1.0)
        return [(i, weight * scale) for i, weight in zip(ids, weights, strict=True)]

    def angles(self, length: int, size: int) -> Tensor:
        """[T, d/2]"""
        base = self.config["rope_theta"]
        powers = torch.arange(0, size, 2, dtype=torch.float64) / size
        return torch.outer(torch.arange(length, dtype=torch.float64), base**-powers)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention [S, T, H * d] of heads [S, H, T, d]."""
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        length = q.shape[2]
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        probs = scores.masked_fill(future, -math.inf).softmax(-1)
        return (probs @ v).transpose(1, 2).flatten(2)

    def gqa(self, at: str, x_STD: Tensor) -> Tensor:
        heads, groups = (
            self.config[key] for key in ("num_attention_heads", "num_key_value_heads")
        )

        def split(name: str, count: int) -> Tensor:
            out = x_STD @ self.weight(f"{at}{name}_proj.weight").T
            if (bias := f"{at}{name}_proj.bias") in self.tensors:
                out = out + self.weight(bias)
            norm, heads = f"{at}{name}_norm.weight", out.unflatten(2, (count, -1))
            if norm in self.tensors:
                # Of each head, or of all heads together.
                per_head = len(self.tensors[norm]) == heads.shape[-1] != out.shape[-1]
                out = self.norm(norm, heads if per_head else out)
                heads = out.view_as(heads)
            return heads.transpose(1, 2)

        q, k, v = split("q", heads), split("k", groups), split("v", groups)
        size = int(q.shape[-1] * self.config.get("partial_rotary_factor", 1))
        size = self.config.get("rotary_dim", size)
        angles = self.angles(x_STD.shape[1], size)

        def turn(x: Tensor) -> Tensor:
            (a, b), rest = x[..., :size].chunk(2, -1), x[..., size:]
            cos, sin = angles.cos(), angles.sin()
            return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)

        k, v = (t.repeat_interleave(heads // groups, 1) for t in (turn(k), v))
        return self.attend(turn(q), k, v) @ self.weight(at + "o_proj.weight").T

    def mla(self, at: str, x_STD: Tensor) -> Tensor:
        config, heads = self.config, self.config["num_attention_heads"]
        nope, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
        if config["q_lora_rank"]:
            low = x_STD @ self.weight(at + "q_a_proj.weight").T
            low = self.norm(at + "q_a_layernorm.weight", low, 1e-6)
            q = low @ self.weight(at + "q_b_proj.weight").T
        else:
            q = x_STD @ self.weight(at + "q_proj.weight").T
        q = q.unflatten(2, (heads, -1)).transpose(1, 2)
        latent = x_STD @ self.weight(at + "kv_a_proj_with_mqa.weight").T
        latent, k_rope = latent.split([config["kv_lora_rank"], rope], -1)
        latent = self.norm(at + "kv_a_layernorm.weight", latent, 1e-6)
        kv = latent @ self.weight(at + "kv_b_proj.weight").T
        kv = kv.unflatten(2, (heads, -1)).transpose(1, 2)
        angles = self.angles(x_STD.shape[1], rope)

        def turn(x: Tensor) -> Tensor:
            pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
            turned = pairs * torch.polar(torch.ones_like(angles), angles)
            return torch.view_as_real(turned).flatten(-2)

        k_rope = turn(k_rope[:, None]).expand(-1, heads, -1, -1)
        q = torch.cat([q[..., :nope], turn(q[..., nope:])], -1)
        k = torch.cat([kv[..., :nope], k_rope], -1)
        return self.attend(q, k, kv[..., nope:]) @ self.weight(at + "o_proj.weight").T

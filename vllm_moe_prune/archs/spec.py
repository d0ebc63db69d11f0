"""The vocabulary of an architecture table: one file per family uses these words.

Axis letters: ``E`` experts, ``F`` expert width, ``D`` hidden size, ``2F`` gate rows
followed by up rows. The engine drops experts by cutting ``E`` (or by dropping the
tensors whose name carries ``{expert}``) and never looks at a family's name.
"""

import re
from dataclasses import dataclass
from typing import Literal

Role = Literal["router", "gate", "up", "down", "gate_up"]


@dataclass(frozen=True)
class TensorRule:
    """One kind of tensor: where it is found and what its axes mean."""

    template: str
    axes: str
    role: Role

    def name(self, layer: int, expert: int | None = None) -> str:
        """The tensor's name in the checkpoint for one layer (and expert)."""
        return self.template.format(layer=layer, expert=expert)

    @property
    def per_expert(self) -> bool:
        """True where each expert has a tensor of its own."""
        return "{expert}" in self.template

    @property
    def pattern(self) -> re.Pattern[str]:
        """Matches the names this rule covers, with groups ``layer`` and ``expert``."""
        escaped = re.escape(self.template)
        escaped = escaped.replace(r"\{layer\}", r"(?P<layer>\d+)")
        return re.compile(escaped.replace(r"\{expert\}", r"(?P<expert>\d+)") + r"\Z")


@dataclass(frozen=True)
class Layout:
    """One way in which checkpoints of a family spell their router and experts."""

    name: str
    rules: tuple[TensorRule, ...]
    stock_vllm: bool
    """Whether unmodified vLLM reads these names (else the plugin's class is named)."""

    def rule(self, role: Role) -> TensorRule | None:
        """The rule of a role, or None where this layout has none (packed: gate, up)."""
        return next((rule for rule in self.rules if rule.role == role), None)

    @property
    def router(self) -> TensorRule:
        """The router's rule; every layout has one."""
        return next(rule for rule in self.rules if rule.role == "router")

    @property
    def experts(self) -> tuple[TensorRule, ...]:
        """The rules of the expert matrices, in the order they are written."""
        return tuple(rule for rule in self.rules if rule.role != "router")


@dataclass(frozen=True)
class ConfigKeys:
    """The real attribute names of the family's configuration class (not aliases)."""

    experts: str
    top_k: str
    width: str
    layers: str = "num_hidden_layers"
    hidden: str = "hidden_size"


@dataclass(frozen=True)
class MoeArch:
    """A family as data; class paths are strings so that a table imports nothing."""

    model_type: str
    stock_architecture: str
    pruned_architecture: str
    config: ConfigKeys
    layouts: tuple[Layout, ...]
    layer_prefix: str
    """What every tensor of a decoder layer starts with: ``model.layers.{layer}.``"""
    moe_members: tuple[str, ...]
    """Names below ``layer_prefix`` that leave with a dropped MoE sublayer."""
    skip_name: str
    """What ``per_layer_config`` calls the MoE sublayer in its ``skip`` list."""
    renormalise: bool
    """Whether the top-k router weights are rescaled to sum to one."""
    hf_layer: str
    hf_rotary: str
    hf_norm: str
    per_layer_lists: tuple[str, ...] = ("layer_types",)
    """Keys of config.json that hold one entry per decoder layer."""
    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    head: str = "lm_head.weight"

    def layer_of(self, name: str) -> int | None:
        """The decoder layer a tensor belongs to, or None for embeddings and head."""
        start, _, _ = self.layer_prefix.partition("{layer}")
        if not name.startswith(start):
            return None
        digits = name[len(start) :].split(".", 1)[0]
        return int(digits) if digits.isdecimal() else None

    def is_moe_member(self, name: str, layer: int) -> bool:
        """Whether a tensor leaves when the MoE sublayer of its layer is dropped."""
        prefix = self.layer_prefix.format(layer=layer)
        return name.removeprefix(prefix).startswith(self.moe_members)

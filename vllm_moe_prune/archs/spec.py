"""The vocabulary of an architecture table: one file per family uses these words.

Axis letters: ``E`` experts, ``F`` expert width, ``D`` hidden size, ``2F`` gate rows
followed by up rows. The engine drops experts by cutting ``E`` (or by dropping the
tensors whose name carries ``{expert}``) and never looks at a family's name.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from .pattern import Key as Key
from .pattern import MoePattern as MoePattern

Role = Literal["router", "router_bias", "gate", "up", "down", "gate_up"]
ROUTER_ROLES = ("router", "router_bias")
Scores = Literal["softmax", "sigmoid"]
Evidence = Literal["transformers", "float64", "vLLM's class", "plugin", "two ranks"]


ATTENTION = "self_attn."
"""What names of attention start with below a layer; every family calls it so."""
LLAMA_ATTENTION: Mapping[str, str] = {
    "q_proj": "Q D",
    "k_proj": "K D",
    "v_proj": "K D",
    "o_proj": "D Q",
}
"""Matrices of attention and their axes: D hidden, Q and K head size times heads."""
LATENT_ATTENTION: Mapping[str, str] = {
    "q_proj": "Q D",
    "q_a_proj": "A D",
    "q_b_proj": "Q A",
    "kv_a_proj_with_mqa": "LR D",
    "kv_b_proj": "NV L",
    "o_proj": "D V",
}
"""MLA's; queries go through ``q_proj``, or through the two others. A and L are the
ranks of queries and of keys with values, R is what a head has for positions; of all
heads together Q are queries, V values, NV values and keys that know no position."""
MOE_NORM = "post_attention_layernorm"
"""The norm before the MoE sublayer; every family calls it so."""


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
        # re.escape has put a backslash before each brace.
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
    def router_parts(self) -> tuple[TensorRule, ...]:
        """What has a row per expert and is cut with the router, the router first."""
        parts = (self.router, self.rule("router_bias"))
        return tuple(rule for rule in parts if rule is not None)

    @property
    def experts(self) -> tuple[TensorRule, ...]:
        """The rules of the expert matrices, in the order they are written."""
        return tuple(rule for rule in self.rules if rule.role not in ROUTER_ROLES)


@dataclass(frozen=True, kw_only=True)
class ConfigKeys:
    """The real attribute names of the family's configuration class (not aliases)."""

    experts: str
    experts_in_files: str | None = None
    """What config.json calls ``experts`` where that is an alias of the class: in
    ``per_layer_config`` an alias is ignored without a word."""
    top_k: str
    width: str
    layers: str = "num_hidden_layers"
    hidden: str = "hidden_size"
    mtp_layers: str | None = None
    """How many layers behind the last one predict further tokens ahead."""


@dataclass(frozen=True, kw_only=True)
class RouterKeys:
    """How routers of the family decide; the keys are of config.json."""

    scores: Key = Key(None, "softmax")
    renormalize: Key = Key(None, True)
    """Whether the chosen weights are rescaled to sum to one."""
    renormalize_single: bool = True
    """Whether that holds for top-1 too, which makes the one weight 1."""
    scale: Key = Key(None, 1.0)
    """Factor of the chosen weights, renormalized or not."""
    groups: Key = Key(None, 1)
    """Equal, contiguous groups of experts, the best of which are chosen from."""
    top_groups: Key = Key(None, 1)
    method: Key = Key(None, "")
    methods: tuple[str, ...] = ("",)
    """The values of ``method`` that these keys describe."""
    ungrouped: tuple[str, ...] = ()
    """Those of them under which groups are not looked at."""
    group_best: int = 1
    """A group is as good as the sum of its best this many experts."""
    fp32: bool = False
    """Whether logits are computed in fp32 rather than in the stored dtype."""


@dataclass(frozen=True, kw_only=True)
class RouterRule:
    """How the routers of one checkpoint decide: ``RouterKeys`` read from its config."""

    scores: Scores = "softmax"
    renormalize: bool = True
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    group_best: int = 1
    fp32: bool = False

    def group_floor(self, top_k: int) -> int:
        """Fewest experts of a group with which routing keeps its meaning.

        Any ``top_groups`` groups then hold ``top_k`` experts, and a group has as many
        as its score adds up.
        """
        return max(-(-top_k // self.top_groups), self.group_best)


@dataclass(frozen=True)
class GatedMlp:
    """An MLP that is no routed expert: down(act(gate(x)) * up(x))."""

    prefix: str
    """Below the layer's prefix: ``mlp.shared_experts.``"""
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    weighed_by: str | None = None
    """Below the layer's prefix, a matrix [1, D]: its sigmoid weighs the output."""

    @property
    def weigher(self) -> str | None:
        """The name of that matrix below the layer's prefix."""
        return f"{self.weighed_by}.weight" if self.weighed_by else None

    @property
    def names(self) -> tuple[str, str, str]:
        """Gate, up and down below the layer's prefix."""
        gate, up, down = (
            f"{self.prefix}{part}.weight" for part in (self.gate, self.up, self.down)
        )
        return gate, up, down


@dataclass(frozen=True)
class Residual:
    """A dense MLP beside the experts, which then read the layer's input (Arctic)."""

    mlp: GatedMlp
    norm: str
    """Its norm, below the layer's prefix."""
    present: Key
    """Whether the checkpoint has it; without it experts read what attention gives."""


@dataclass(frozen=True, kw_only=True)
class MtpNames:
    """What a layer that predicts further tokens has beside a decoder layer's tensors.

    Its input is ``proj [norm(embedding of the next token), norm(hidden state)]``, the
    hidden state being normed already as the layers before it end. Names are below the
    layer's prefix.
    """

    embedding: str = "embed_tokens"
    embedding_norm: str = "enorm"
    hidden_norm: str = "hnorm"
    proj: str = "eh_proj"
    final_norm: str = "shared_head.norm"
    head: str = "shared_head.head"

    @property
    def all(self) -> tuple[str, ...]:
        """The names of the tensors."""
        parts = (self.embedding, self.embedding_norm, self.hidden_norm, self.proj)
        return tuple(f"{part}.weight" for part in (*parts, self.final_norm, self.head))


@dataclass(frozen=True, kw_only=True)
class MoeArch:
    """A family as data; class paths are strings so that a table imports nothing."""

    model_type: str
    checkpoints: str
    """Published ones, for people."""
    tested: tuple[Evidence, ...]
    """What the tests compare; ``support.py`` has the meaning."""
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
    hf_config: str
    """The transformers classes that attention, rotary embedding and norms are from."""
    hf_layer: str
    hf_rotary: str
    hf_norm: str
    router: RouterKeys = RouterKeys()
    pattern: MoePattern = MoePattern()
    dense_mlp: GatedMlp | None = None
    """The MLP of layers without experts."""
    shared: GatedMlp | None = None
    """Experts that every token uses, as one MLP, where the checkpoint has any."""
    shared_count: Key = Key(None, 0)
    """How many they are: the MLP is as wide as so many experts."""
    shared_width: Key | None = None
    """How wide it is, where config.json says that instead."""
    dense_width: str = "intermediate_size"
    """The config key of the width of ``dense_mlp``."""
    residual: Residual | None = None
    slides: bool = False
    """Whether config.json's ``sliding_window`` bounds what its attention sees."""
    attention: Mapping[str, str] = field(default_factory=lambda: LLAMA_ATTENTION)
    """The matrices below ``ATTENTION``, which recovery can train."""
    mtp: MtpNames = MtpNames()
    per_layer_lists: tuple[str, ...] = ("layer_types",)
    """Keys of config.json that hold one entry per decoder layer."""
    empty_lists: tuple[str, ...] = ()
    """Keys of config.json that must be empty or false, or the table is wrong."""
    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    head: str = "lm_head.weight"
    stock_vllm: bool = True
    """Whether unmodified vLLM has the family."""
    vllm_names: tuple[tuple[str, str], ...] = ()
    """Parts of names that vLLM spells differently, and how."""

    @property
    def shared_key(self) -> Key:
        """The key without which there are no shared experts."""
        return self.shared_width or self.shared_count

    def layer_of(self, name: str) -> int | None:
        """The decoder layer a tensor belongs to, or None for embeddings and head."""
        start, _, _ = self.layer_prefix.partition("{layer}")
        if not name.startswith(start):
            return None
        digits = name[len(start) :].split(".", 1)[0]
        # int() alone would also take signs, spaces and underscores.
        return int(digits) if digits.isdecimal() else None

    def is_moe_member(self, name: str, layer: int) -> bool:
        """Whether a tensor leaves when the MoE sublayer of its layer is dropped."""
        prefix = self.layer_prefix.format(layer=layer)
        return name.removeprefix(prefix).startswith(self.moe_members)

    def is_moe_norm(self, name: str, layer: int) -> bool:
        """Whether a tensor is of the norm before the MoE sublayer of its layer."""
        return name.startswith(f"{self.layer_prefix.format(layer=layer)}{MOE_NORM}.")

"""A pruned checkpoint as one torch module that can be trained, whatever was cut.

transformers builds no model whose layers differ, so this is the streaming forward with
all its layers in memory: attention and norms are the stock classes, experts are ours.

Axes: b sequences, T tokens of a sequence, N = b*T tokens, n some of them, D hidden, F
width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint as recomputed

from ..archs.spec import MOE_NORM
from ..calibrate.expert_forward import (
    Activation,
    Router,
    Routing,
    choose,
    expert_tokens,
    weigh,
)
from ..calibrate.forward import StreamingModel
from ..calibrate.router import router_of
from ..calibrate.stock import causal_mask
from ..checkpoint.dense_parts import DensePart, dense_parts
from ..checkpoint.open import Checkpoint, Layer
from ..checkpoint.reader import Expert, read_expert
from .teacher import Teacher, divergence


@dataclass(frozen=True)
class Place:
    """Where a weight of the model is stored."""

    tensor: str
    """Its name in the checkpoint."""
    row: int | None = None
    """The expert's, where all experts of a layer are one tensor."""
    half: int | None = None
    """0 gate, 1 up, where these are one matrix."""


class TrainableModel(nn.Module):
    """All decoder layers, embedding and head; not the layers that only look ahead."""

    def __init__(self, source: Checkpoint) -> None:
        """Read every weight, in the dtype that the checkpoint computes with.

        Raises:
            CheckpointError: A tensor that the forward needs is missing or misshapen.
        """
        super().__init__()
        stream = StreamingModel(source)
        self.arch = arch = source.arch
        self.stock_config, self.rotary = stream.config, stream.rotary
        table_VD = stream.read(arch.embedding)
        vocabulary, hidden = table_VD.shape
        # On meta: no [V, D] is filled at random only to be replaced.
        self.embedding = nn.Embedding(vocabulary, hidden, device="meta")
        self.embedding.weight = nn.Parameter(table_VD)
        self.blocks = nn.ModuleList(
            Block(stream, layer) for layer in source.decoder_layers
        )
        self.norm = stream.build_norm(arch.final_norm)
        self.head: nn.Module | None = None
        if stream.head_name != arch.embedding:
            self.head = linear(stream.read(stream.head_name))
        self.teacher: Teacher | None = None
        """Gives the distributions to approach; None: the text is the aim."""
        self.places = {
            "embedding.weight": Place(arch.embedding),
            "norm.weight": Place(arch.final_norm),
        }
        if self.head is not None:
            self.places["head.weight"] = Place(stream.head_name)
        for number, layer in enumerate(source.decoder_layers):
            for name, place in _places(source, layer, self.blocks[number]).items():
                self.places[f"blocks.{number}.{name}"] = place

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        aim: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """The mean loss of the next token, or the divergence from the teacher, in nats.

        Args:
            input_ids: Token ids [b, T].
            labels: The same; each sequence predicts its tokens 1 to T - 1.
            aim: The teacher's final hidden states [b, T, D], if there is one.
        """
        logits_bTV = self.logits(input_ids)
        if aim is not None and self.teacher is not None:
            return {"loss": divergence(logits_bTV, self.teacher.logits(aim)).mean()}
        # In fp32, as the streaming forward's nll has it.
        loss = functional.cross_entropy(
            logits_bTV[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
        )
        return {"loss": loss}

    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Of every token [b, T, V]. Blocks are computed again for their gradients."""
        hidden_bTD = self.embedding(input_ids)
        position_ids = torch.arange(input_ids.shape[1], device=hidden_bTD.device)[None]
        inputs = {
            "position_embeddings": self.rotary(hidden_bTD, position_ids),
            "attention_mask": causal_mask(
                self.arch, self.stock_config, hidden_bTD, position_ids
            ),
            "position_ids": position_ids,
        }
        for block in self.blocks:
            # Activations of one block at a time in memory, for one more forward.
            if torch.is_grad_enabled():
                hidden_bTD = recomputed(block, hidden_bTD, inputs, use_reentrant=False)
            else:
                hidden_bTD = block(hidden_bTD, inputs)
        normed_bTD = self.norm(hidden_bTD)
        if self.head is None:
            # Tied: one parameter, which gets the gradients of both its uses.
            return functional.linear(normed_bTD, self.embedding.weight)
        logits_bTV: torch.Tensor = self.head(normed_bTD)
        return logits_bTV


class Block(nn.Module):
    """One decoder layer, in the order of ``StreamingModel.enter``."""

    def __init__(self, stream: StreamingModel, layer: Layer) -> None:
        """Read its weights."""
        super().__init__()
        checkpoint, index = stream.checkpoint, layer.index
        prefix = checkpoint.arch.layer_prefix.format(layer=index)
        parts = dense_parts(checkpoint, layer)
        self.attention = stream.build_layer(index)
        alone = [part for part in parts if part.norm is not None]
        self.dense = nn.ModuleList(_mlp(stream, prefix, part) for part in alone)
        self.dense_norms = nn.ModuleList(
            stream.build_norm(f"{prefix}{part.norm}.weight") for part in alone
        )
        self.moe_norm: nn.Module | None = None
        if layer.has_moe or layer.norm_only:
            self.moe_norm = stream.build_norm(f"{prefix}{MOE_NORM}.weight")
        self.moe: MixtureOfExperts | None = None
        if layer.has_moe:
            self.moe = MixtureOfExperts(stream, layer)
            shared = [part for part in parts if part.norm is None]
            self.moe.shared = nn.ModuleList(
                _mlp(stream, prefix, part) for part in shared
            )
        self.reads_input = stream.experts_read_input

    def forward(self, hidden_bTD: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """The hidden states that leave the layer."""
        x_bTD = None
        # Arctic's experts read what enters the block, before attention adds to it.
        if self.moe_norm is not None and self.reads_input:
            x_bTD = self.moe_norm(hidden_bTD)
        hidden_bTD = self.attention(hidden_bTD, **inputs)
        for norm, mlp in zip(self.dense_norms, self.dense, strict=True):
            hidden_bTD = hidden_bTD + mlp(norm(hidden_bTD))
        if self.moe_norm is None:
            return hidden_bTD
        if x_bTD is None:
            x_bTD = self.moe_norm(hidden_bTD)
        if self.moe is None:
            return hidden_bTD + x_bTD
        return hidden_bTD + self.moe(x_bTD.flatten(0, 1)).view_as(hidden_bTD)


class MixtureOfExperts(nn.Module):
    """Router, experts and shared ones; as ``run_experts``, with gradients."""

    shared: nn.ModuleList
    bias_R: torch.Tensor | None
    groups_R: torch.Tensor | None

    def __init__(self, stream: StreamingModel, layer: Layer) -> None:
        """Read its weights."""
        super().__init__()
        checkpoint, like = stream.checkpoint, torch.empty(0, dtype=stream.dtype)
        found = router_of(checkpoint, layer, like)
        rule = checkpoint.rule
        # DeepSeek's gates are fp32 products; other logits are of the stored dtype.
        rows_RD = found.rows_RD.float() if rule.fp32 else found.rows_RD
        self.router = linear(rows_RD)
        # Buffers follow the module to its device but are not trained.
        self.register_buffer("bias_R", found.bias_R, persistent=False)
        self.register_buffer("groups_R", found.groups_R, persistent=False)
        self.experts = nn.ModuleList(
            TrainableMlp(
                read_expert(checkpoint, layer, number), stream.act, stream.dtype
            )
            for number in range(layer.num_experts)
        )
        self.rule, self.top_k, self.redirect = rule, layer.top_k, layer.redirect
        self.where = f"{checkpoint.folder}: layer {layer.index}"

    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        """The sublayer's output [N, D]."""
        with torch.autocast(x_ND.device.type, enabled=False):
            # The router's dtype decides who is chosen.
            logits_NR = self.router(x_ND.to(self.router.weight.dtype))
        router = Router(
            self.router.weight, self.top_k, self.rule, self.bias_R, self.groups_R
        )
        routing = choose(logits_NR, router, self.where)
        out_ND = mixed(x_ND, routing, self.redirect, list(self.experts))
        for mlp in self.shared:
            out_ND = out_ND + mlp(x_ND)
        return out_ND


class TrainableMlp(nn.Module):
    """down(act(gate(x)) * up(x))."""

    weigher_1D: torch.Tensor | None

    def __init__(
        self,
        weights: Expert,
        act: Activation,
        dtype: torch.dtype,
        weigher_1D: torch.Tensor | None = None,
    ) -> None:
        """Three matrices, in the dtype that the model computes with; one that stays."""
        super().__init__()
        self.register_buffer("weigher_1D", weigher_1D, persistent=False)
        self.gate, self.up, self.down = (linear(one.to(dtype)) for one in weights)
        self.act = act

    def forward(self, x_nD: torch.Tensor) -> torch.Tensor:
        """Its output [n, D], not weighted."""
        out_nD: torch.Tensor = self.down(self.act(self.gate(x_nD)) * self.up(x_nD))
        if self.weigher_1D is not None:
            out_nD = out_nD * weigh(x_nD, self.weigher_1D)
        return out_nD


def mixed(
    x_ND: torch.Tensor,
    routing: Routing,
    redirect: Sequence[int | None] | None,
    experts: Sequence[Callable[[torch.Tensor], torch.Tensor]],
) -> torch.Tensor:
    """The weighted sum of expert outputs [N, D], with gradients.

    Args:
        x_ND: What enters the sublayer.
        routing: Who was chosen.
        redirect: As in ``expert_tokens``.
        experts: Each gives outputs [n, D] for inputs [n, D].
    """
    out_ND = torch.zeros_like(x_ND)
    for number, expert in enumerate(experts):
        token_n, weight_n = expert_tokens(routing, number, redirect)
        if len(token_n):
            # fp32 weight times stored dtype, rounded once: as transformers does it.
            scaled_nD = (expert(x_ND[token_n]) * weight_n.unsqueeze(1)).to(x_ND.dtype)
            out_ND = out_ND.index_add(0, token_n, scaled_nD)
    return out_ND


def keep_zeros(weight: torch.Tensor) -> None:
    """No gradient where a weight is zero: Adam then leaves it exactly as it is."""

    def masked(gradient: torch.Tensor) -> torch.Tensor:
        # Adam's moments stay zero there, and weight decay is off.
        return gradient.masked_fill(weight == 0, 0)

    weight.register_hook(masked)  # type: ignore[no-untyped-call]


def linear(weight: torch.Tensor) -> nn.Linear:
    """A matrix [out, in] as a module."""
    rows, cols = weight.shape
    module = nn.Linear(cols, rows, bias=False, device="meta")
    module.weight = nn.Parameter(weight)
    return module


def _mlp(stream: StreamingModel, prefix: str, part: DensePart) -> TrainableMlp:
    weights = Expert(*(stream.read(prefix + name) for name in part.mlp.names))
    weigher = part.mlp.weigher
    weigher_1D = None if weigher is None else stream.read(prefix + weigher)
    return TrainableMlp(weights, stream.act, stream.dtype, weigher_1D)


def _places(checkpoint: Checkpoint, layer: Layer, block: nn.Module) -> dict[str, Place]:
    """Where the weights of a block are stored, by their names below it."""
    arch, layout, index = checkpoint.arch, checkpoint.layout, layer.index
    prefix = arch.layer_prefix.format(layer=index)
    found = {
        f"attention.{name}": Place(prefix + name)
        for name, _ in block.get_submodule("attention").named_parameters()
    }
    # Counted apart, as Block has them in two lists: with a norm, and shared.
    numbers = {True: 0, False: 0}
    for part in dense_parts(checkpoint, layer):
        alone = part.norm is not None
        number = numbers[alone]
        numbers[alone] += 1
        at = f"dense.{number}" if alone else f"moe.shared.{number}"
        for role, name in zip(("gate", "up", "down"), part.mlp.names, strict=True):
            found[f"{at}.{role}.weight"] = Place(prefix + name)
        if alone:
            found[f"dense_norms.{number}.weight"] = Place(f"{prefix}{part.norm}.weight")
    if layer.has_moe or layer.norm_only:
        found["moe_norm.weight"] = Place(f"{prefix}{MOE_NORM}.weight")
    if not layer.has_moe:
        return found
    found["moe.router.weight"] = Place(layout.router.name(index))
    for expert in range(layer.num_experts):
        for rule in layout.experts:
            name, row = rule.name(index, expert), None if rule.per_expert else expert
            packed = rule.role == "gate_up"
            for half, role in enumerate(("gate", "up") if packed else (rule.role,)):
                at = f"moe.experts.{expert}.{role}.weight"
                found[at] = Place(name, row, half if packed else None)
    return found

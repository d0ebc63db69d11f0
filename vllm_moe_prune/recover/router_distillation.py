"""Router-only distillation: pruned layers taught to give what the original ones give.

Both models run side by side, one layer at a time. A pruned MoE sublayer sees what the
recovered layers before it make of the text; its router rows are moved by Adam until its
output, of the experts that are left, is as near as it gets to the original layer's.
Which experts are chosen has no gradient; how much the chosen ones count has. A router
that is no nearer afterwards, on windows that it was not trained on, stays as it was.

Axes: S windows, T tokens of a window, N = S*T tokens, n those of a step, D hidden, R
router rows.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field, FiniteFloat
from torch.nn import functional

from ..calibrate.expert_forward import Routing, expert_hidden, place, route, run_experts
from ..calibrate.forward import StreamingModel
from ..calibrate.memory import release_freed
from ..calibrate.perplexity import leave, routed
from ..calibrate.router import router_of
from ..checkpoint.open import Layer
from ..checkpoint.reader import Expert, read_expert
from ..recipes.numbers import Count
from .model import keep_zeros, mixed
from .options import Training

# Tokens that an error is summed of at a time: bounds its fp32 copies.
CHUNK = 1 << 13
TINY = torch.finfo(torch.float32).tiny
"""Instead of zero, where experts give nothing that a distance could be a share of."""


Ratio = Annotated[FiniteFloat, Field(ge=0.0)]


@dataclass(frozen=True)
class LayerError:
    """How far a pruned MoE sublayer is from the original one."""

    layer: Count
    original_layer: Count
    before: Ratio
    """Squared distance of the outputs over the originals' squares, on held-out text."""
    after: Ratio


class Distillation:
    """The original and the pruned model, layer by layer beside each other."""

    def __init__(
        self,
        original: StreamingModel,
        pruned: StreamingModel,
        training: Training,
        ids_ST: torch.Tensor,
        heldout: int,
    ) -> None:
        """Nothing has been run.

        Args:
            original: Whose outputs are the aim.
            pruned: Whose routers are to be trained.
            training: How; its batches are windows.
            ids_ST: Text; the last ``heldout`` windows only judge.
            heldout: How many those are.
        """
        assert pruned.checkpoint.remap is not None
        self.original, self.pruned, self.training = original, pruned, training
        self.entries = pruned.checkpoint.remap.layers
        self.sequences, self.length = ids_ST.shape
        # Held-out windows are the last ones, so what is trained on is a slice of N.
        self.tokens = (self.sequences - heldout) * self.length
        self.aim_STD = original.embed(ids_ST)
        self.hidden_STD = pruned.embed(ids_ST)
        self._next = 0

    def layer(
        self,
        layer: Layer,
        known: torch.Tensor | None = None,
        step: Callable[[], object] = lambda: None,
    ) -> tuple[torch.Tensor, LayerError] | None:
        """Train a layer's router and go through the layer with it.

        Args:
            layer: Of the pruned model; they come in order.
            known: Its router, if it has been trained already.
            step: Called after each step.

        Returns:
            The router [R, D] in fp32 and what it changed; None where there is none, or
            it was known.
        """
        entry = self.entries[layer.index]
        # Blocks that the cut dropped: the original runs through them alone.
        while self._next < entry.original_layer:
            self._run(self.original, self._next, self.aim_STD)
            self._next += 1
        target_ND = self._run(self.original, entry.original_layer, self.aim_STD)
        self._next += 1
        _, x_ND = self.pruned.enter(layer.index, self.hidden_STD)
        if x_ND is None:
            return None
        assert target_ND is not None
        taught = _TaughtLayer(self.pruned, layer, x_ND, target_ND, self.tokens)
        found = None
        if known is not None:
            taught.rows_RD = known.float().to(x_ND.device)
            out_ND = taught.output()
        else:
            first_RD, first_ND = taught.rows_RD, taught.output()
            before = taught.error(first_ND)
            taught.rows_RD = self._trained(taught, step)
            out_ND = taught.output()
            after = taught.error(out_ND)
            if not after <= before:  # it may be no number
                taught.rows_RD, out_ND, after = first_RD, first_ND, before
            error = LayerError(layer.index, entry.original_layer, before, after)
            found = taught.rows_RD.cpu(), error
        leave(self.pruned, layer.index, self.hidden_STD, x_ND, out_ND)
        release_freed()
        return found

    @torch.no_grad()
    def _run(
        self, model: StreamingModel, index: int, hidden_STD: torch.Tensor
    ) -> torch.Tensor | None:
        """A whole layer, in place; what its routed experts added, if it has any."""
        _, x_ND = model.enter(index, hidden_STD)
        if x_ND is None:
            return None
        # The aim leaves out shared experts, which routers have no say in.
        routed_ND = routed(model, index, x_ND)
        # A clone: leave adds the shared experts in place.
        leave(model, index, hidden_STD, x_ND, routed_ND.clone())
        return routed_ND

    def _trained(
        self, taught: "_TaughtLayer", step: Callable[[], object]
    ) -> torch.Tensor:
        from transformers import get_cosine_schedule_with_warmup

        asked = self.training
        taught.rows_RD = rows_RD = taught.rows_RD.clone().requires_grad_()
        keep_zeros(rows_RD)
        adam = torch.optim.Adam([rows_RD], lr=asked.learning_rate)
        rising = round(asked.warmup * asked.steps)
        # As the Trainer's for the other methods: up linearly, down along a cosine.
        schedule = get_cosine_schedule_with_warmup(adam, rising, asked.steps)
        order = torch.Generator().manual_seed(asked.seed)
        count = min(asked.batch_size * self.length, self.tokens)
        for _ in range(asked.steps):
            # Tokens of any windows: without attention they are independent here.
            at_n = torch.randperm(self.tokens, generator=order)[:count]
            adam.zero_grad()
            taught.loss(at_n.to(rows_RD.device)).backward()  # type: ignore[no-untyped-call]
            adam.step()
            schedule.step()
            step()
        return rows_RD.detach()


class _TaughtLayer:
    """A pruned MoE sublayer with its experts in memory, and what it should give."""

    def __init__(
        self,
        model: StreamingModel,
        layer: Layer,
        x_ND: torch.Tensor,
        target_ND: torch.Tensor,
        tokens: int,
    ) -> None:
        checkpoint = model.checkpoint
        self.layer, self.act = layer, model.act
        self.where = f"{checkpoint.folder}: layer {layer.index}"
        self.x_ND, self.target_ND, self.tokens = x_ND, target_ND, tokens
        self.router = router_of(checkpoint, layer, x_ND)
        # In fp32: Adam's small steps would vanish in bf16.
        self.rows_RD = self.router.rows_RD.float()
        # Every step runs all of them, so one layer's stay in memory.
        self.experts = [
            place(read_expert(checkpoint, layer, number), x_ND)
            for number in range(layer.num_experts)
        ]

    def loss(self, at_n: torch.Tensor) -> torch.Tensor:
        """Squared distance over the targets' squares, of some tokens."""
        x_nD, target_nD = self.x_ND[at_n], self.target_ND[at_n].float()
        outputs = [functools.partial(self._output, expert) for expert in self.experts]
        out_nD = mixed(x_nD, self._route(x_nD), self.layer.redirect, outputs)
        distance = (out_nD.float() - target_nD).square().sum()
        return distance / target_nD.square().sum().clamp_min(TINY)

    @torch.no_grad()
    def output(self) -> torch.Tensor:
        """Of all tokens [N, D], without gradients."""
        return run_experts(
            self.x_ND,
            self._route(self.x_ND),
            self.layer,
            self.experts.__getitem__,
            self.act,
        )

    @torch.no_grad()
    def error(self, out_ND: torch.Tensor) -> float:
        """The loss of the held-out tokens."""
        distance = squares = 0.0
        for start in range(self.tokens, len(out_ND), CHUNK):
            target_nD = self.target_ND[start : start + CHUNK].float()
            wrong_nD = out_ND[start : start + CHUNK].float() - target_nD
            distance += float(wrong_nD.square().sum(dtype=torch.float64))
            squares += float(target_nD.square().sum(dtype=torch.float64))
        return distance / max(squares, TINY)

    def _route(self, x_nD: torch.Tensor) -> Routing:
        # Rounded as it will be stored; the gradient passes through.
        rows_RD = self.rows_RD.to(x_nD.dtype)
        return route(x_nD, self.router._replace(rows_RD=rows_RD), self.where)

    def _output(self, expert: Expert, x_nD: torch.Tensor) -> torch.Tensor:
        hidden_nF = expert_hidden(x_nD, expert, self.act)
        return functional.linear(hidden_nF, expert.down_DF)

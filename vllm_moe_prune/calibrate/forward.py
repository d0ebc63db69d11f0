"""The streaming forward: one decoder layer at a time, one expert at a time.

Attention and norms are the stock classes of transformers, built without their MoE
block and filled from the checkpoint when a layer's turn comes; the experts are ours,
so that every layout, uneven expert counts and redirects run through the same code.
Nothing here computes a gradient. Repeating a run repeats every bit.

Axes: S sequences, T tokens of a sequence, D hidden, F expert width, N = S*T tokens,
n some of them, R router rows, K top-k, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch.nn import functional

from ..archs.spec import MOE_NORM, TensorRule
from ..checkpoint.dense_parts import DensePart, dense_parts
from ..checkpoint.open import Checkpoint, Layer
from ..checkpoint.reader import DTYPES, Expert, read_weight
from ..errors import CalibrationError
from ..ranks.group import ALONE, Ranks
from .expert_forward import Routing, route
from .members import check_layers, info_of
from .memory import batches, keep_few_kernels
from .router import router_of
from .shared_experts import exchange, run_mlp
from .stock import (
    activation,
    attention_bytes,
    causal_mask,
    stock_config,
    stock_layer,
    stock_norm,
    stock_rotary,
    watch_linears,
)

# Of temporaries; tokens are processed in chunks that stay within it.
LOGIT_BYTES = 64 << 20
NO_TARGET = -100
Made = TypeVar("Made")


class Observer(Protocol):
    """Is shown what enters the parts of a layer that every token goes through.

    Either method returns weights, by name, that the layer then computes with.
    """

    def before_attention(
        self, model: "StreamingModel", index: int, hidden_STD: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The attention of a layer is about to run."""

    def before_mlp(
        self, model: "StreamingModel", index: int, part: DensePart, x_ND: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """One of its MLPs is about to run on ``x_ND``."""


class StreamingModel:
    """A checkpoint as a model of which only the part in use is in memory."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        """Check config and tensor names; read no weight.

        Args:
            checkpoint: The model.
            device: Where it computes.
            dtype: In what; None: as it is stored.
            ranks: Who shares in running layers; all of them then run the same.

        Raises:
            CheckpointError: A tensor that the forward needs is missing or misshapen.
        """
        keep_few_kernels()
        self.checkpoint, self.ranks = checkpoint, ranks
        self.device = torch.device(device)
        arch = checkpoint.arch
        self.act = activation(checkpoint)
        self.config = stock_config(checkpoint)
        self.dtype = dtype or DTYPES[info_of(checkpoint, arch.embedding).dtype]
        self.layers_run = 0
        self._observer: Observer | None = None
        self._replaced: dict[str, torch.Tensor] = {}
        self._held: dict[str | int, Any] | None = None
        check_layers(checkpoint, self.config)
        # Only now: sizes in config.json are those of tensors that are there.
        self.rotary = stock_rotary(checkpoint, self.config).to(self.device)
        info_of(checkpoint, arch.final_norm)
        info_of(checkpoint, self.head_name)

    @property
    def num_layers(self) -> int:
        """Decoder layers, with or without an MoE sublayer."""
        return len(self.checkpoint.decoder_layers)

    @property
    def forward_passes(self) -> int:
        """Sweeps of token batches through all layers, a begun one counted whole."""
        return math.ceil(self.layers_run / self.num_layers)

    @contextmanager
    def shown_to(self, observer: Observer) -> Iterator[None]:
        """Show layers run inside to ``observer`` and use the weights it returns."""
        self._observer = observer
        try:
            yield
        finally:
            self._observer = None
            self._replaced.clear()

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Keep what is read and built inside: one layer runs several times."""
        self._held = {}
        try:
            yield
        finally:
            self._held = None

    @torch.no_grad()
    def watch_attention(
        self,
        index: int,
        hidden_STD: torch.Tensor,
        see: Callable[[str, torch.Tensor], None],
    ) -> None:
        """Show what enters each matrix of a layer's attention; change nothing.

        Args:
            index: The layer.
            hidden_STD: What enters it.
            see: Called with a matrix's name below the layer and inputs [n, D].
        """
        # On a copy: the layer itself runs later, with the weights that replace these.
        self._attend(index, hidden_STD.clone(), see)

    @torch.no_grad()
    def embed(self, tokens_ST: torch.Tensor) -> torch.Tensor:
        """Token ids to the hidden states that enter layer 0."""
        table_VD = self.read(self.checkpoint.arch.embedding)
        largest = int(tokens_ST.max()) if tokens_ST.numel() else 0
        if largest >= len(table_VD):
            raise CalibrationError(
                f"{self.checkpoint.folder}: the tokenizer gives token {largest}, but "
                f"the model knows {len(table_VD)}. The tokenizer is another model's."
            )
        return functional.embedding(tokens_ST.to(self.device), table_VD)

    @torch.no_grad()
    def further(
        self, index: int, hidden_STD: torch.Tensor, tokens_ST: torch.Tensor
    ) -> torch.Tensor:
        """What enters an MTP layer: the hidden states with the tokens that followed.

        Args:
            index: The layer.
            hidden_STD: What the layer before it gave.
            tokens_ST: All tokens. A state whose next token is not among them goes.
        """
        names, arch = self.checkpoint.arch.mtp, self.checkpoint.arch
        depth = index - self.num_layers
        prefix = arch.layer_prefix.format(layer=index)
        before = arch.layer_prefix.format(layer=index - 1)
        final = f"{before}{names.final_norm}.weight" if depth else arch.final_norm
        own = f"{prefix}{names.embedding}.weight"
        table_VD = self.read(own if own in self.checkpoint.tensors else arch.embedding)
        # MTP layer k sees the state at t and the token at t + k + 1.
        next_ST = tokens_ST[:, depth + 1 :].to(self.device)
        ends = self.build_norm(final)
        embedding_norm, hidden_norm = (
            self.build_norm(f"{prefix}{norm}.weight")
            for norm in (names.embedding_norm, names.hidden_norm)
        )
        proj = self.read(f"{prefix}{names.proj}.weight")
        out_STD = hidden_STD.new_empty(*next_ST.shape, len(proj), device=self.device)
        sequences, length = next_ST.shape
        # About six copies, the norms' in fp32.
        for batch in batches(sequences, 24 * length * len(proj)):
            state_bTD = ends(hidden_STD[batch, :-1].to(self.device))
            next_bTD = functional.embedding(next_ST[batch], table_VD)
            both = (embedding_norm(next_bTD), hidden_norm(state_bTD))
            out_STD[batch] = functional.linear(torch.cat(both, dim=-1), proj)
        return out_STD

    @torch.no_grad()
    def enter(
        self, index: int, hidden_STD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run layer ``index`` up to its experts, in place.

        (Of hidden states on another device, a copy on the model's is changed.)

        Returns:
            The hidden states with all added to them that is not experts', and what
            router and experts see, normed [N, D]; None where the layer has none and is
            done.
        """
        layer = self.checkpoint.layers[index]
        hidden_STD = hidden_STD.to(self.device)
        x_ND = None
        normed = layer.has_moe or layer.norm_only
        # Arctic's experts read the block's input, so their norm comes before attention.
        if normed and self.experts_read_input:
            x_ND = self._normed(index, MOE_NORM, hidden_STD)
        if self._observer is not None:
            self._replaced |= self._observer.before_attention(self, index, hidden_STD)
        self._attend(index, hidden_STD)
        for part in dense_parts(self.checkpoint, layer):
            if part.norm is not None:
                normed_ND = self._normed(index, part.norm, hidden_STD)
                self._add_mlp(index, part, normed_ND, hidden_STD.view_as(normed_ND))
        if normed and x_ND is None:
            x_ND = self._normed(index, MOE_NORM, hidden_STD)
        if layer.norm_only and x_ND is not None:
            hidden_STD += x_ND.view_as(hidden_STD)
            x_ND = None
        self.layers_run += not layer.mtp
        return hidden_STD, x_ND

    def _attend(
        self,
        index: int,
        hidden_STD: torch.Tensor,
        see: Callable[[str, torch.Tensor], None] | None = None,
    ) -> None:
        sequences, length, _ = hidden_STD.shape
        position_embeddings, mask, masked_batch = None, None, 0
        position_ids = torch.arange(length, device=self.device).unsqueeze(0)
        size = attention_bytes(self.config, length, self.dtype.itemsize)
        several = list(batches(sequences, size))
        # What is watched is summed, by every rank in the same order.
        ranks = self.ranks if see is None else ALONE
        own = several[ranks.rank :: ranks.size]
        if own:
            layer = self._once(index, lambda: self.build_layer(index))
            if see is not None:
                watch_linears(layer, see)
        for batch in own:
            x_bTD = hidden_STD[batch]
            if len(x_bTD) != masked_batch:
                masked_batch = len(x_bTD)
                mask = causal_mask(
                    self.checkpoint.arch, self.config, x_bTD, position_ids
                )
                position_embeddings = self.rotary(x_bTD, position_ids)
            hidden_STD[batch] = layer(
                x_bTD,
                position_embeddings=position_embeddings,
                attention_mask=mask,
                position_ids=position_ids,
            )
        exchange(ranks, hidden_STD, several)

    @torch.no_grad()
    def add_shared(self, index: int, x_ND: torch.Tensor, out_ND: torch.Tensor) -> None:
        """Add what shared experts make of ``x_ND`` to the routed ones' output."""
        for part in dense_parts(self.checkpoint, self.checkpoint.layers[index]):
            if part.norm is None:
                self._add_mlp(index, part, x_ND, out_ND)

    @torch.no_grad()
    def route(
        self,
        layer: Layer,
        x_ND: torch.Tensor,
        read: Callable[[TensorRule], torch.Tensor] | None = None,
    ) -> Routing:
        """Which router rows each token chooses, in the arithmetic of transformers.

        Args:
            layer: The layer, as it is or as a plan leaves it.
            x_ND: What ``enter`` returned.
            read: Gives the router and its bias; without it they are the checkpoint's.

        Raises:
            CheckpointError: The logits are not finite.
        """
        router = router_of(self.checkpoint, layer, x_ND, read)
        return route(x_ND, router, f"{self.checkpoint.folder}: layer {layer.index}")

    @torch.no_grad()
    def nll(
        self, hidden_STD: torch.Tensor, tokens_ST: torch.Tensor
    ) -> tuple[float, int]:
        """Summed next-token negative log-likelihood in nats, and how many tokens.

        Each sequence predicts its tokens 1 to T - 1, bar those that are NO_TARGET.
        """
        target_N = self._targets(tokens_ST)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for chunk, logits_nV in self._logits(hidden_STD):
            loss_n = functional.cross_entropy(
                logits_nV, target_N[chunk], ignore_index=NO_TARGET, reduction="none"
            )
            total += loss_n.sum(dtype=torch.float64)
        return float(total), int((target_N != NO_TARGET).sum())

    @torch.no_grad()
    def exact_matches(self, hidden_STD: torch.Tensor, tokens_ST: torch.Tensor) -> int:
        """How many sequences have each of their targets as the likeliest next token.

        For an answer behind its prompt that is what greedy generation would write.
        """
        target_N = self._targets(tokens_ST)
        right_N = torch.empty_like(target_N, dtype=torch.bool)
        for chunk, logits_nV in self._logits(hidden_STD):
            right_N[chunk] = logits_nV.argmax(dim=-1) == target_N[chunk]
        right_N |= target_N == NO_TARGET
        return int(right_N.view(tokens_ST.shape).all(dim=1).sum())

    def _targets(self, tokens_ST: torch.Tensor) -> torch.Tensor:
        # The last token of a sequence predicts nothing; skipping it saves a copy.
        target_ST = functional.pad(tokens_ST[:, 1:], (0, 1), value=NO_TARGET)
        return target_ST.flatten().to(self.device)

    def _logits(self, hidden_STD: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Logits in fp32, of some of the tokens at a time."""
        norm = self.build_norm(self.checkpoint.arch.final_norm)
        head_VD = self.read(self.head_name)
        x_ND = hidden_STD.flatten(0, 1)
        for chunk in batches(len(x_ND), 4 * len(head_VD), LOGIT_BYTES):
            yield chunk, functional.linear(norm(x_ND[chunk]), head_VD).float()

    @property
    def head_name(self) -> str:
        """The matrix that gives logits."""
        arch = self.checkpoint.arch
        return arch.embedding if self.config.tie_word_embeddings else arch.head

    def read(self, name: str) -> torch.Tensor:
        """A weight as the forward computes with it."""
        info_of(self.checkpoint, name)
        if name in self._replaced:
            return self._replaced[name].to(self.device, self.dtype)
        return self._once(
            name, lambda: read_weight(self.checkpoint, name).to(self.device, self.dtype)
        )

    def _once(self, key: str | int, make: Callable[[], Made]) -> Made:
        """What ``make`` returns; inside ``holding`` it is called once per key."""
        if self._held is None:
            return make()
        if key not in self._held:
            self._held[key] = make()
        found: Made = self._held[key]
        return found

    @property
    def experts_read_input(self) -> bool:
        """Whether they read what enters the layer, not what attention gives."""
        residual = self.checkpoint.arch.residual
        return residual is not None and residual.present.read(self.checkpoint.config)

    def _normed(self, index: int, norm: str, hidden_STD: torch.Tensor) -> torch.Tensor:
        prefix = self.checkpoint.arch.layer_prefix.format(layer=index)
        built = self.build_norm(f"{prefix}{norm}.weight")
        return self._apply_norm(built, hidden_STD.flatten(0, 1))

    def _add_mlp(
        self, index: int, part: DensePart, x_ND: torch.Tensor, out_ND: torch.Tensor
    ) -> None:
        """Add an MLP of all tokens to ``out_ND``, in place."""
        if self._observer is not None:
            self._replaced |= self._observer.before_mlp(self, index, part, x_ND)
        prefix = self.checkpoint.arch.layer_prefix.format(layer=index)
        mlp = Expert(*(self.read(prefix + name) for name in part.mlp.names))
        weigher_1D = self.read(prefix + name) if (name := part.mlp.weigher) else None
        run_mlp(self.ranks, out_ND, x_ND, mlp, self.act, weigher_1D)

    def build_layer(self, index: int) -> torch.nn.Module:
        """A stock decoder layer with its weights, that adds its attention only."""
        prefix = self.checkpoint.arch.layer_prefix.format(layer=index)
        layer = stock_layer(self.checkpoint.arch, self.config, index)
        weights = {name: self.read(prefix + name) for name in layer.state_dict()}
        # assign: on the meta device there is no storage to copy into.
        layer.load_state_dict(weights, assign=True)
        return layer

    def build_norm(self, name: str) -> torch.nn.Module:
        """A stock norm with its weight."""
        return stock_norm(self.checkpoint.arch, self.config, self.read(name))

    def _apply_norm(self, norm: torch.nn.Module, x_ND: torch.Tensor) -> torch.Tensor:
        out_ND = torch.empty_like(x_ND)
        # The norm works on about three copies in fp32.
        for chunk in batches(len(x_ND), 12 * x_ND.shape[1]):
            out_ND[chunk] = norm(x_ND[chunk])
        return out_ND

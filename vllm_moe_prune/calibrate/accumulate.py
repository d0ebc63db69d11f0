"""The measure stage: what ``decide`` needs to know about a checkpoint.

Router rows and weights need no data. Co-activation needs one forward pass over the
calibration tokens, whatever the number of experts. Layer by layer, resumable.

Axes: E experts, N tokens, n some of them, K top-k.
"""

import hashlib
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ..checkpoint.layer_hashes import DIGITS, EMBEDDING, layer_hashes
from ..checkpoint.open import Checkpoint, Layer
from ..checkpoint.reader import read_expert
from ..errors import CheckpointError
from ..progress import Progress, Report, ignore
from ..ranks.group import ALONE, Ranks
from . import routed
from .boundary import BoundaryStore
from .data import Tokens
from .distances import router_distances, router_row_norms, weight_distances
from .expert_forward import Served
from .forward import StreamingModel
from .memory import release_freed
from .shared_experts import check_states, run_shared
from .stats import (
    PER_SOURCE,
    Array,
    LayerStats,
    SourceStats,
    Stats,
    together,
)
from .stats_file import FORMAT_VERSION


def measure(
    checkpoint: Checkpoint,
    *,
    router: bool = True,
    weights: bool = True,
    tokens: Tokens | None = None,
    fields: frozenset[str] = frozenset(),
    device: torch.device | str = "cpu",
    report: Report = ignore,
    work: Path | None = None,
    ranks: Ranks = ALONE,
) -> Stats:
    """Collect the statistics of every MoE layer.

    Args:
        checkpoint: The model, original or cut before.
        router: Measure the router rows.
        weights: Measure the experts' weights: distances, sums of powers.
        tokens: Count routing and co-activation over these; one forward pass.
        fields: Further sums of that pass, by their names in ``LayerStats`` and
            ``Stats``; see ``routed.FIELDS``.
        device: Where the forward pass runs.
        report: Called after every layer.
        work: A folder for what a killed run needs to continue; gone at the end.
        ranks: Share out the experts; every rank returns the same.

    Raises:
        CheckpointError: The checkpoint redirects removed experts, or holds NaN.
        OutputError: ``work`` is of another run, or the disk is full.
    """
    if any(layer.redirect is not None for layer in checkpoint.layers):
        raise CheckpointError(
            f"{checkpoint.folder}: its routers still have rows of removed experts "
            "(routing: redirect), so router rows and experts do not match. Measure and "
            "cut the original instead."
        )
    run = _Measure(
        checkpoint=checkpoint,
        router=router,
        weights=weights,
        tokens=tokens,
        fields=fields,
        device=device,
        ranks=ranks,
    )
    # Block similarity needs every hidden state, so it cannot start in the middle.
    if work is None or fields & routed.BLOCKS:
        return run.all_layers(None, report)
    store = BoundaryStore(work, run.key)
    stats = run.all_layers(store, report)
    if ranks.rank == 0:
        store.clear()
    return stats


@dataclass(frozen=True, kw_only=True)
class _Measure:
    """One run of ``measure``: what its steps share."""

    checkpoint: Checkpoint
    router: bool
    weights: bool
    tokens: Tokens | None
    fields: frozenset[str]
    device: torch.device | str
    ranks: Ranks

    @property
    def key(self) -> str:
        """Hash of everything that determines the statistics."""
        # The device is left out: a killed run may continue on another one.
        parts = (
            FORMAT_VERSION,
            self.checkpoint.fingerprint,
            # The fingerprint samples large tensors: what changed since may hide in one.
            self.checkpoint.files,
            self.router,
            self.weights,
            self.tokens.sha256 if self.tokens else None,
            sorted(self.fields),
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def _shape_STD(self, tokens: Tokens) -> tuple[int, ...]:
        """Of the hidden states."""
        width = self.checkpoint.config[self.checkpoint.arch.config.hidden]
        return (*tokens.ids_ST.shape, int(width))

    @torch.no_grad()
    def all_layers(self, store: BoundaryStore | None, report: Report) -> Stats:
        # Behind the last router there is nothing to measure, but for blocks.
        whole = bool(self.fields & routed.BLOCKS)
        layers = self.checkpoint.layers
        last = len(layers) - 1
        last = last if whole else self.checkpoint.moe_layers[-1].index
        names = self.tokens.names if self.tokens else ()
        blocks = routed.BlockSamples(self._sources(len(names)))
        model = None
        if self.tokens:
            model = StreamingModel(self.checkpoint, self.device, ranks=self.ranks)
        hidden = torch.empty(0)
        start = 0
        stats = Stats(
            fingerprint=self.checkpoint.fingerprint,
            layers={},
            sources={name: SourceStats() for name in names},
        )
        # Without text an empty tensor is saved: its file says where to continue.
        shape_STD = (0,) if self.tokens is None else self._shape_STD(self.tokens)
        saved = store.load(shape_STD, not_after=last) if store else None
        # Without their sums the states are of no use: earlier layers would be missing.
        if store and saved and (summed := store.load_stats(saved[0])):
            (start, hidden), stats = saved, summed
        elif model and self.tokens:
            hidden = model.embed(self.tokens.ids_ST)
        self.ranks.agree(saved_state=start)
        meter = _Meter(self.checkpoint, last, report)
        if model and EMBEDDING not in stats.weight_hashes:
            stats.weight_hashes[EMBEDDING] = self._hashes(None)
        for layer in layers[start : last + 1]:
            found = self._weight_stats(layer) if layer.has_moe else LayerStats()
            if model and self.tokens:
                go_on = whole or layer.index < last
                if layer.mtp:
                    hidden = model.further(layer.index, hidden, self.tokens.ids_ST)
                if whole and layer.index == 0:
                    blocks.add(hidden)
                hidden, sums = self._forward(model, layer, hidden, go_on)
                found = replace(found, **_joined(sums))
                for at, name in enumerate(names):
                    own = {
                        key: np.asarray(value_Q[at])
                        for key, value_Q in sums.items()
                        if key in PER_SOURCE
                    }
                    stats.sources[name].layers[layer.index] = LayerStats(**own)
                # MTP states have fewer tokens, so they do not compare with the others.
                if whole and not layer.mtp:
                    blocks.add(hidden)
            if layer.has_moe:
                stats.layers[layer.index] = found
            # Right after it was read, while the system still has it in memory.
            if model or self.weights:
                stats.weight_hashes[str(layer.index)] = self._hashes(layer)
            # States are the same on all ranks; one of them keeps them.
            if store and layer.index < last and self.ranks.rank == 0:
                store.save(layer.index + 1, hidden, stats)
                # Older boundaries go only once a newer one is on disk.
                store.keep_from(layer.index + 1)
            meter.tell(layer.index)
        # Layers that a killed run had finished belong to the same pass.
        before = min(start, len(self.checkpoint.decoder_layers))
        run = (before + model.layers_run) / model.num_layers if model else 0
        calibration = self.tokens.describe() if self.tokens else {}
        stats = replace(stats, forward_passes=math.ceil(run), calibration=calibration)
        if not (whole and model):
            return stats
        for at, name in enumerate(names):
            cosine_HH, count = blocks.sums(at)
            stats.sources[name] = replace(
                stats.sources[name], block_cosine_HH=cosine_HH, block_tokens=count
            )
        cosine_HH, count = blocks.sums()
        return replace(stats, block_cosine_HH=cosine_HH, block_tokens=count)

    def _hashes(self, layer: Layer | None) -> tuple[str, ...]:
        """What was read of a layer, each expert by the rank that ran it."""
        index, count = (None, 0) if layer is None else (layer.index, layer.num_experts)
        own = [expert for expert in range(count) if self.ranks.owns(expert)]
        found = layer_hashes(self.checkpoint, index, own)
        mine = torch.zeros(1, count, DIGITS // 2, dtype=torch.uint8)
        for expert in own:
            digest = bytearray.fromhex(found[expert])
            mine[0, expert] = torch.frombuffer(digest, dtype=torch.uint8)
        whole = self.ranks.by_owner({"hashes": mine})["hashes"][0]
        return (found[None], *(bytes(row.tolist()).hex() for row in whole))

    def _sources(self, names: int, length: int | None = None) -> routed.Sources:
        """The source of each token; of ``length`` tokens in each window."""
        if self.tokens is None:
            return routed.Sources(torch.zeros(0, dtype=torch.int64), 1)
        length = self.tokens.ids_ST.shape[1] if length is None else length
        of_N = self.tokens.source_S.repeat_interleave(length)
        return routed.Sources(of_N.to(self.device), max(1, names))

    def _weight_stats(self, layer: Layer) -> LayerStats:
        found = LayerStats()
        if self.router:
            sqdist_EE, norm = router_distances(self.checkpoint, layer)
            found = replace(
                found,
                router_sqdist_EE=sqdist_EE,
                router_norm=norm,
                router_row_norm_E=router_row_norms(self.checkpoint, layer),
            )
        if self.weights:
            sqdist_EE, powers_E5 = weight_distances(self.checkpoint, layer, self.device)
            found = replace(
                found, weight_sqdist_EE=sqdist_EE, weight_powers_E5=powers_E5
            )
        return found

    def _forward(
        self, model: StreamingModel, layer: Layer, hidden: torch.Tensor, go_on: bool
    ) -> tuple[torch.Tensor, routed.Sums]:
        """Run one layer and sum; the last one only as far as something is summed."""
        hidden, x_ND = model.enter(layer.index, hidden)
        if x_ND is None or self.tokens is None:
            return hidden, {}
        # MTP layers see fewer tokens of each window.
        sources = self._sources(len(self.tokens.names), hidden.shape[1])
        routing = model.route(layer, x_ND)
        check_states(self.ranks, x_ND, layer.index)
        sums = routed.counted(routing, layer.num_experts, sources)
        if self.fields & routed.SCORES:
            sums |= routed.scores(routing, sources)
        if self.fields & routed.OUTPUTS:
            sums |= routed.outputs(
                x_ND,
                routing,
                layer.num_experts,
                lambda expert: read_expert(self.checkpoint, layer, expert),
                model.act,
                sources,
            )
        # Only routing is asked of the last layer: its experts need not run.
        run = routed.CONTRIBUTIONS | routed.COSINES | routed.OUTPUT_SUMS
        if not go_on and not self.fields & run:
            return hidden, sums
        seen: list[routed.Contributions | routed.OutputSums] = []
        if self.fields & routed.CONTRIBUTIONS:
            seen.append(routed.Contributions(layer.num_experts, sources))
        if self.fields & routed.OUTPUT_SUMS:
            seen.append(routed.OutputSums(layer.num_experts, x_ND.shape[1]))

        def see(expert: int, served: Served) -> None:
            for one in seen:
                one(expert, served)

        out_ND = run_shared(
            self.ranks,
            x_ND,
            routing,
            layer,
            lambda expert: read_expert(self.checkpoint, layer, expert),
            model.act,
            see if seen else None,
        )
        for one in seen:
            sums |= self._of_owners(one.sums)
        # After contributions, which are of routed experts alone; before the cosines, as
        # MoE(x) in Eq. 8 and 9 is the whole sublayer.
        model.add_shared(layer.index, x_ND, out_ND)
        if self.fields & routed.COSINES:
            sums |= routed.cosines(hidden.flatten(0, 1), x_ND, out_ND, sources)
        hidden += out_ND.view_as(hidden)
        return hidden, sums

    def _of_owners(self, sums: routed.Sums) -> routed.Sums:
        """Sums of experts that ran elsewhere, from there."""
        found = {name: torch.from_numpy(value) for name, value in sums.items()}
        return {
            name: value.numpy() for name, value in self.ranks.by_owner(found).items()
        }


def _joined(sums: routed.Sums) -> dict[str, Array]:
    """The sums of all sources together."""
    return {name: together(name, list(value_Q)) for name, value_Q in sums.items()}


class _Meter:
    """Reports progress by the bytes of the layers done."""

    def __init__(self, checkpoint: Checkpoint, last: int, report: Report) -> None:
        self._report = report
        self._layers = last + 1
        self._bytes = [
            sum(
                checkpoint.tensors[name].nbytes
                for name in checkpoint.layer_names(index)
            )
            for index in range(last + 1)
        ]

    def tell(self, index: int) -> None:
        """Layer ``index`` is done."""
        release_freed()
        done = index + 1
        total = sum(self._bytes)
        self._report(
            Progress(
                stage="measure",
                layer=done,
                layers=self._layers,
                bytes_done=sum(self._bytes[:done]),
                bytes_total=total,
            )
        )

"""One pass through the layers under a plan: trim, slim, write, feed the next one.

Ranks share the experts of each layer, and what is copied; attention, dense matrices and
refits run on all of them, and rank 0 writes what comes of that.
"""

import dataclasses
from functools import partial

import torch

from ..calibrate.boundary import BoundaryStore
from ..calibrate.data import Tokens
from ..calibrate.forward import StreamingModel
from ..calibrate.memory import release_freed
from ..calibrate.shared_experts import check_states, run_shared
from ..checkpoint.layer_hashes import check_layer
from ..checkpoint.open import Checkpoint
from ..checkpoint.writer import ShardWriter
from ..decide.cut_plan import CutPlan
from ..progress import Progress, Report
from .copy import write_tensor
from .layer_cut import LayerCut, layer_cuts
from .layer_record import LayerRecord, journalled
from .quantize_dense import DenseQuantizer, quantize_head
from .quantize_layer import quantize_layer
from .refit import Refits
from .slice import OutputTensor
from .slim_dense import DenseSlimmer
from .slim_layer import SlimContext, slim_layer, trimmed_routing
from .transaction import Workspace
from .trimmed import survivor


class StreamingPass:
    """One run of ``cut``: what its steps share."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: CutPlan,
        tensors: list[OutputTensor],
        writer: ShardWriter,
        space: Workspace,
        report: Report,
    ) -> None:
        self.checkpoint = checkpoint
        self.plan = plan
        self.writer = writer
        self.space = space
        self.ranks = space.ranks
        # A resumed pass skips layers: what was done to them is in the journal.
        self.records = journalled(space.journal)
        self._report = report
        self._by_layer: dict[int | None, list[OutputTensor]] = {}
        for tensor in tensors:
            self._by_layer.setdefault(tensor.layer, []).append(tensor)
        self._bytes_total = sum(sum(shard.sizes.values()) for shard in writer.shards)
        self._cuts = layer_cuts(checkpoint, plan)

    def without_activations(self) -> None:
        """Copy, average and slim by weights alone."""
        context = SlimContext(self.writer, None, self.ranks)
        self._write_beside()
        for cut in self._cuts:
            self._check(cut)
            self._write(cut.index)
            if self._changes(cut):
                record = LayerRecord(layer=cut.index)
                dense = self._dense(cut)
                dense.without_data()
                record.dense_zeros = dense.zeros
                if self._changes_experts(cut.index):
                    self._change_experts(context, cut, record, None, want_output=False)
                self._record(record)
            self._tell(cut.index + 1)

    @torch.no_grad()
    def with_activations(self, tokens: Tokens, device: str, key: str) -> None:
        """One calibration pass: each layer slimmed on what the slimmed ones feed it."""
        model = StreamingModel(self.checkpoint, device, ranks=self.ranks)
        context = SlimContext(self.writer, model, self.ranks)
        refits = Refits(model, self._cuts, tokens) if self.plan.refits else None
        ids_ST = tokens.ids_ST if refits is None else refits.ids_ST
        store = BoundaryStore(self.space.work, key)
        self._write_beside()
        width = self.checkpoint.config[self.checkpoint.arch.config.hidden]
        shape_STD = (*ids_ST.shape, int(width))
        # Not beyond a layer with unwritten tensors: that one has to be run again.
        saved = store.load(shape_STD, not_after=self._first_unfinished())
        start, hidden = saved or (0, model.embed(ids_ST))
        self.ranks.agree(saved_state=start)
        hidden = hidden.to(model.device)
        if refits is not None and refits.is_apart(start):
            refits.original_WTD = store.load_original(
                start, (*refits.shape_WT, int(width))
            )
        # Of the layers that are left; nobody reads what the last one gives.
        last = max(cut.index for cut in self._cuts if not cut.drops_block)
        for cut in self._cuts[start:]:
            self._check(cut)
            if not cut.drops_block:
                if refits is not None:
                    refits.pass_layer(cut.index, hidden)
                if cut.layer.mtp:
                    hidden = model.further(cut.index, hidden, ids_ST)
                record = LayerRecord(layer=cut.index)
                dense = self._dense(cut)
                is_last = cut.index == last
                with model.shown_to(dense):
                    hidden = self._slim_and_run(
                        context, model, refits, cut, record, hidden, is_last=is_last
                    )
                record.dense_zeros = dense.zeros
                if self._changes(cut):
                    self._record(record)
            # States are the same on all ranks; one of them keeps them.
            if cut.index < last and self.ranks.rank == 0:
                apart = refits is not None and refits.is_apart(cut.index + 1)
                original = refits.original_WTD if refits and apart else None
                store.save(cut.index + 1, hidden, original_WTD=original)
                # Shards span layers: the oldest unfinished one may start further back.
                store.keep_from(min(cut.index + 1, self._first_unfinished()))
            self._tell(cut.index + 1)

    def _slim_and_run(
        self,
        context: SlimContext,
        model: StreamingModel,
        refits: Refits | None,
        cut: LayerCut,
        record: LayerRecord,
        hidden: torch.Tensor,
        *,
        is_last: bool,
    ) -> torch.Tensor:
        index, trimmed = cut.index, cut.trimmed
        self._write(index)
        # Its output feeds nothing and its weights are written: no need to run it.
        if is_last and not self._changes(cut):
            return hidden
        hidden, x_ND = model.enter(index, hidden)
        if x_ND is None:
            return hidden
        if not trimmed.has_moe:
            # drop-moe-keep-norm: the normed input is added where the MoE's output was.
            return hidden + x_ND.view_as(hidden) if trimmed.norm_only else hidden
        check_states(self.ranks, x_ND, index)
        others_ND = None
        if refits is not None and cut.layer_plan.refit:
            others_ND = torch.zeros_like(x_ND)
            model.add_shared(index, x_ND, others_ND)
            cut = refits.refit(cut, record, hidden, x_ND, others_ND)
        if self._changes_experts(index):
            out_ND = self._change_experts(
                context,
                cut,
                record,
                x_ND,
                # Shared experts are changed where their output is added.
                want_output=not is_last or self.plan.changes_shared,
            )
        else:
            routing = trimmed_routing(model, cut, x_ND)
            read = partial(survivor, cut)
            out_ND = run_shared(self.ranks, x_ND, routing, trimmed, read, model.act)
        if out_ND is not None:
            # Before refits they have run already.
            if others_ND is None:
                model.add_shared(index, x_ND, out_ND)
            else:
                out_ND += others_ND
            hidden += out_ND.view_as(hidden)
        return hidden

    def _change_experts(
        self,
        context: SlimContext,
        cut: LayerCut,
        record: LayerRecord,
        x_ND: torch.Tensor | None,
        *,
        want_output: bool,
    ) -> torch.Tensor | None:
        """Slim or quantize experts of a layer, refitted perhaps, and write them."""
        if not self.plan.is_quantized:
            return slim_layer(context, cut, record, x_ND, want_output=want_output)
        # AWQ also scales what makes or reads the experts' input.
        scaled = [one for one in self._by_layer[cut.index] if one.made == "scaled"]
        return quantize_layer(
            context, cut, record, x_ND, scaled, want_output=want_output
        )

    def _check(self, cut: LayerCut) -> None:
        """Refuse a layer that is not what was measured, before it is written."""
        # Between a kill and a resume the states of files are compared.
        if any(
            self.writer.needs(one.name) for one in self._by_layer.get(cut.index, ())
        ):
            read = {
                expert
                for new, members in enumerate(cut.survivors)
                if self.ranks.owns(new)
                for expert, _ in members
            }
            check_layer(self.checkpoint, self.plan.weight_hashes, cut.index, read)

    def _dense(self, cut: LayerCut) -> DenseSlimmer | DenseQuantizer:
        """What changes a layer's dense matrices: a plan does one of both."""
        kind = DenseQuantizer if self.plan.is_quantized else DenseSlimmer
        return kind(cut, self.writer, writes=self.ranks.rank == 0)

    def _write_beside(self) -> None:
        """Write what belongs to no layer."""
        check_layer(self.checkpoint, self.plan.weight_hashes, None)
        self._write(None)
        if self.plan.is_quantized and self.ranks.rank == 0:
            quantize_head(self.checkpoint, self.plan, self.writer)

    def _changes(self, cut: LayerCut) -> bool:
        """Whether a layer is slimmed, or matrices of it made anew."""
        slims = cut.changes_experts and not cut.drops_block
        tensors = self._by_layer.get(cut.index, [])
        made = any(tensor.made != "copied" for tensor in tensors)
        return slims or made or cut.layer_plan.refit

    def _changes_experts(self, layer: int) -> bool:
        """Whether its experts are, all or some matrices of each."""
        return any(
            tensor.is_expert
            and (
                tensor.sparsity > 0
                or tensor.made == "quantized"
                or tensor.channels is not None
                or tensor.refitted
            )
            for tensor in self._by_layer.get(layer, [])
        )

    def _write(self, layer: int | None) -> None:
        """Write what is not slimmed; experts are slimmed, and written, as a whole."""
        elsewhere = layer is not None and self._changes_experts(layer)
        for at, tensor in enumerate(self._by_layer.get(layer, [])):
            here = tensor.sparsity == 0 and tensor.made == "copied"
            here &= tensor.channels is None and self.ranks.owns(at)
            if here and not (tensor.is_expert and elsewhere):
                write_tensor(self.checkpoint, tensor, self.writer)

    def _record(self, record: LayerRecord) -> None:
        self.records[record.layer] = record
        self.space.record({"layer": dataclasses.asdict(record)})

    def _first_unfinished(self) -> int:
        """The first input layer that still has a tensor in an unwritten shard."""
        # Not what is written but what is on the disk under its final name.
        done = self.writer.journalled()
        for layer in self.checkpoint.layers:
            for tensor in self._by_layer.get(layer.index, []):
                if self.writer.file_of(tensor.name) not in done:
                    return layer.index
        return len(self.checkpoint.layers)

    def _tell(self, layers_done: int) -> None:
        release_freed()
        self.writer.meet()
        self._report(
            Progress(
                stage="cut",
                layer=layers_done,
                layers=len(self.checkpoint.layers),
                bytes_done=self.writer.bytes_written,
                bytes_total=self._bytes_total,
            )
        )

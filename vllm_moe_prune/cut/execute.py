"""The cut: execute a plan in one streaming pass, resumable, deterministic.

Read a layer, trim it, slim it with the calibration activations that reached it, run
the slimmed layer to feed the next one, write. Data-free plans only copy bytes.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..calibrate.boundary import BoundaryStore
from ..calibrate.data import Tokens
from ..calibrate.expert_forward import run_experts
from ..calibrate.forward import StreamingModel
from ..calibrate.memory import release_freed
from ..calibrate.stats import Stats
from ..checkpoint.open import Checkpoint
from ..checkpoint.writer import (
    MAX_SHARD_BYTES,
    ShardPlan,
    ShardWriter,
    append_journal,
    plan_shards,
    writing,
)
from ..decide.cut_plan import CutPlan, LayerPlan, check_plan, dump_plan
from ..errors import CalibrationError
from ..progress import Progress, Report, ignore
from .achieved import Achieved
from .copy import write_tensor
from .finish import write_companions
from .output import Workspace, companions, open_workspace, publish
from .quantize_layer import quantize_layer
from .slice import OutputTensor, output_tensors
from .slim_dense import DenseSlimmer
from .slim_layer import LayerRecord, SlimContext, slim_layer, trimmed_routing
from .trimmed import survivor, trimmed_layer


@dataclass(frozen=True)
class CutResult:
    """What a cut did."""

    out: Path
    bytes_written: int
    file_bytes: int
    forward_passes: int
    records: tuple[LayerRecord, ...]
    """One per slimmed layer; empty where nothing was slimmed."""
    achieved: Achieved


def execute_plan(
    checkpoint: Checkpoint,
    plan: CutPlan,
    out: Path,
    *,
    tokens: Tokens | None = None,
    device: str = "cpu",
    resume: bool = False,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    report: Report = ignore,
    where: str = "plan",
    stats: Stats | None = None,
) -> CutResult:
    """Write the pruned checkpoint to ``out``.

    Args:
        checkpoint: The input.
        plan: What to do; checked against the input first.
        out: The output folder, which appears when everything is in it.
        tokens: Calibration tokens, needed if ``plan.needs_activations``.
        device: Where the forward pass runs.
        resume: Continue an interrupted run of the same plan.
        overwrite: Replace an existing output once the new one is complete.
        max_shard_bytes: Size limit of one output file.
        report: Called once per layer.
        where: How errors name the plan.
        stats: What the plan was made from, to be kept in the output.

    Raises:
        PlanError: The plan does not fit the checkpoint.
        CheckpointError: A file beside the weights cannot be copied.
        OutputError: The output exists, the disk is full, a resume does not match.
    """
    check_plan(plan, checkpoint.layers, checkpoint.fingerprint, where)
    if plan.needs_activations and tokens is None:
        raise CalibrationError(
            f"{where}: {plan.by_data}, which needs calibration text. "
            "Pass --calibration FILE."
        )
    companions(checkpoint)
    tensors = output_tensors(checkpoint, plan)
    shards = plan_shards(tensors, max_shard_bytes)
    key = _run_key(plan, shards, tokens)
    space = open_workspace(out, key, shards, resume=resume, overwrite=overwrite)
    writer = ShardWriter(space.partial, shards, space.finished)
    run = _Cut(checkpoint, plan, tensors, writer, space, report)
    passes = 1 if plan.needs_activations else 0
    try:
        if plan.needs_activations and tokens is not None:
            run.with_activations(tokens, device, key)
        else:
            run.without_activations()
        writer.close()
        records = tuple(run.records[index] for index in sorted(run.records))
        with writing(space.partial):
            done = write_companions(
                checkpoint, plan, space.partial, shards, records, tokens, passes, stats
            )
            publish(space)
    except BaseException:
        writer.abort()
        raise
    finally:
        space.release()
    return CutResult(
        out=out,
        bytes_written=writer.bytes_written,
        file_bytes=sum(shard.file_bytes for shard in shards),
        forward_passes=passes,
        records=records,
        achieved=done,
    )


def _run_key(plan: CutPlan, shards: Sequence[ShardPlan], tokens: Tokens | None) -> str:
    """Hash of everything that determines the output's bytes."""
    digest = hashlib.sha256(dump_plan(plan).encode())
    for shard in shards:
        digest.update(shard.header)
    if plan.needs_activations and tokens is not None:
        digest.update(tokens.sha256.encode())
    return digest.hexdigest()


class _Cut:
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
        self.records = _journalled(space.journal)
        self._report = report
        self._by_layer: dict[int | None, list[OutputTensor]] = {}
        for tensor in tensors:
            self._by_layer.setdefault(tensor.layer, []).append(tensor)
        self._bytes_total = sum(sum(shard.sizes.values()) for shard in writer.shards)
        self._new_index: dict[int, int] = {}
        for layer_plan in plan.layers:
            if layer_plan.action != "drop-block":
                self._new_index[layer_plan.layer] = len(self._new_index)

    def without_activations(self) -> None:
        """Copy, average and slim by weights alone."""
        context = SlimContext(self.checkpoint, self.plan, self.writer, None)
        dense = DenseSlimmer(self.checkpoint, self.plan, self.writer)
        self._write(None)
        for layer, layer_plan in zip(
            self.checkpoint.layers, self.plan.layers, strict=True
        ):
            self._write(layer.index)
            if self._changes(layer_plan):
                record = LayerRecord(layer.index)
                dense.begin(layer, self._new_index[layer.index])
                dense.by_magnitude()
                record.dense_zeros = dense.zeros
                if self._changes_experts(layer.index):
                    self._change_experts(context, record, None, want_output=False)
                self._record(record)
            self._tell(layer.index + 1)

    @torch.no_grad()
    def with_activations(self, tokens: Tokens, device: str, key: str) -> None:
        """One calibration pass: each layer slimmed on what the slimmed ones feed it."""
        model = StreamingModel(self.checkpoint, device)
        context = SlimContext(self.checkpoint, self.plan, self.writer, model)
        model.observer = dense = DenseSlimmer(self.checkpoint, self.plan, self.writer)
        store = BoundaryStore(self.space.work, key)
        self._write(None)
        saved = store.load(not_after=self._first_unfinished())
        start, hidden = saved or (0, model.embed(tokens.ids_ST))
        hidden = hidden.to(model.device)
        last = max(self._new_index)
        for layer, layer_plan in zip(
            self.checkpoint.layers, self.plan.layers, strict=True
        ):
            if layer.index < start:
                continue
            if layer_plan.action != "drop-block":
                if layer.mtp:
                    hidden = model.further(layer.index, hidden, tokens.ids_ST)
                record = LayerRecord(layer.index)
                dense.begin(layer, self._new_index[layer.index])
                hidden = self._slim_and_run(
                    context, model, record, hidden, is_last=layer.index == last
                )
                model.replaced.clear()
                record.dense_zeros = dense.zeros
                if self._changes(layer_plan):
                    self._record(record)
            if layer.index < last:
                store.save(layer.index + 1, hidden)
                store.keep_from(min(layer.index + 1, self._first_unfinished()))
            self._tell(layer.index + 1)

    def _slim_and_run(
        self,
        context: SlimContext,
        model: StreamingModel,
        record: LayerRecord,
        hidden: torch.Tensor,
        *,
        is_last: bool,
    ) -> torch.Tensor:
        index = record.layer
        layer, layer_plan = self.checkpoint.layers[index], self.plan.layers[index]
        self._write(index)
        if is_last and not self._changes(layer_plan):
            return hidden
        hidden, x_ND = model.enter(index, hidden)
        trimmed = trimmed_layer(layer, layer_plan, self.plan)
        if x_ND is None:
            return hidden
        if not trimmed.has_moe:
            return hidden + x_ND.view_as(hidden) if trimmed.norm_only else hidden
        if self._changes_experts(index):
            out_ND = self._change_experts(
                context,
                record,
                x_ND,
                # Shared experts are slimmed where their output is added.
                want_output=not is_last or self.plan.slim_parts != ("experts",),
            )
        else:
            routing = trimmed_routing(model, self.plan, layer, layer_plan, x_ND)
            out_ND = run_experts(
                x_ND,
                routing,
                trimmed,
                lambda new: survivor(self.checkpoint, layer, layer_plan, new),
                model.act,
            )
        if out_ND is not None:
            model.add_shared(index, x_ND, out_ND)
            hidden += out_ND.view_as(hidden)
        return hidden

    def _change_experts(
        self,
        context: SlimContext,
        record: LayerRecord,
        x_ND: torch.Tensor | None,
        *,
        want_output: bool,
    ) -> torch.Tensor | None:
        """Slim or quantize the experts of a layer, and write them."""
        index = record.layer
        layer, layer_plan = self.checkpoint.layers[index], self.plan.layers[index]
        what = context, layer, layer_plan, record, self._new_index[index], x_ND
        if not self.plan.is_quantized:
            return slim_layer(*what, want_output=want_output)
        scaled = [one for one in self._by_layer[index] if one.made == "scaled"]
        return quantize_layer(*what, scaled, want_output=want_output)

    def _changes(self, layer_plan: LayerPlan) -> bool:
        """Whether zeros may be written into a layer, or its experts quantized."""
        stays = layer_plan.action != "drop-block"
        slims = layer_plan.sparsity > 0 and self.plan.slim != "none"
        return (stays and slims) or (self.plan.is_quantized and bool(layer_plan.keep))

    def _changes_experts(self, layer: int) -> bool:
        """Whether its experts are, all or some matrices of each."""
        return any(
            tensor.is_expert and (tensor.sparsity > 0 or tensor.made == "quantized")
            for tensor in self._by_layer.get(layer, [])
        )

    def _write(self, layer: int | None) -> None:
        """Write what is not slimmed; experts are slimmed, and written, as a whole."""
        elsewhere = layer is not None and self._changes_experts(layer)
        for tensor in self._by_layer.get(layer, []):
            here = tensor.sparsity == 0 and tensor.made == "copied"
            if here and not (tensor.is_expert and elsewhere):
                write_tensor(self.checkpoint, tensor, self.writer)

    def _record(self, record: LayerRecord) -> None:
        self.records[record.layer] = record
        append_journal(self.space.partial, {"layer": dataclasses.asdict(record)})

    def _first_unfinished(self) -> int:
        """The first input layer that still has a tensor in an unwritten shard."""
        done = self.writer.journalled()
        for layer in self.checkpoint.layers:
            for tensor in self._by_layer.get(layer.index, []):
                if self.writer.file_of(tensor.name) not in done:
                    return layer.index
        return len(self.checkpoint.layers)

    def _tell(self, layers_done: int) -> None:
        release_freed()
        self._report(
            Progress(
                "cut",
                layers_done,
                len(self.checkpoint.layers),
                self.writer.bytes_written,
                self._bytes_total,
            )
        )


def _journalled(journal: Sequence[dict[str, object]]) -> dict[int, LayerRecord]:
    """Records of layers an interrupted run has slimmed."""
    records = {}
    for entry in journal:
        if isinstance(fields := entry.get("layer"), dict):
            record = LayerRecord(**json.loads(json.dumps(fields)))
            records[record.layer] = record
    return records

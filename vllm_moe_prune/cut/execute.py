"""The cut: execute a plan in one streaming pass, resumable, deterministic.

Read a layer, trim it, slim it with the calibration activations that reached it, run
the slimmed layer to feed the next one, write. Data-free plans only copy bytes.
"""

from dataclasses import dataclass
from pathlib import Path

from ..calibrate.data import Tokens
from ..calibrate.stats import Stats
from ..checkpoint.open import Checkpoint
from ..checkpoint.tensor_hashes import write_hashes
from ..checkpoint.writer import (
    MAX_SHARD_BYTES,
    plan_shards,
)
from ..decide.cut_plan import CutPlan
from ..errors import CalibrationError
from ..files.atomic import writing
from ..progress import Report, ignore
from ..ranks.group import ALONE, Ranks
from .achieved import Achieved, achieved
from .finish import read_records, write_companions
from .layer_record import LayerRecord
from .output import cut_key
from .shared_output import is_complete_for, shared_transaction
from .slice import output_tensors
from .streaming_pass import StreamingPass


@dataclass(frozen=True, kw_only=True)
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
    ranks: Ranks = ALONE,
) -> CutResult:
    """Write the pruned checkpoint to ``out``.

    Args:
        checkpoint: The input.
        plan: What to do; it has passed ``check_plan``.
        out: The output folder, which appears when everything is in it.
        tokens: Calibration tokens, needed if ``plan.needs_activations``.
        device: Where the forward pass runs.
        resume: Continue an interrupted run of the same plan.
        overwrite: Replace an existing output once the new one is complete.
        max_shard_bytes: Size limit of one output file.
        report: Called once per layer.
        where: How errors name the plan.
        stats: What the plan was made from, to be kept in the output.
        ranks: Share out experts and files; all of them come here with the same.

    Raises:
        PlanError: Nothing would be left to route, or rows no longer match experts.
        CheckpointError: A tensor is damaged.
        OutputError: The output exists, the disk is full, a resume does not match.
    """
    if plan.needs_activations and tokens is None:
        raise CalibrationError(
            f"{where}: {plan.by_data}, which needs calibration text. "
            "Pass --calibration FILE."
        )
    tensors = output_tensors(checkpoint, plan)
    shards = plan_shards(tensors, max_shard_bytes)
    key = cut_key(checkpoint, plan, shards, tokens, stats)
    # Also ends a run that was killed between its last renames.
    ours = {"resume": resume, "overwrite": overwrite}
    if is_complete_for(ranks, out, key, **ours):
        return finished_cut(checkpoint, plan, out)
    with shared_transaction(ranks, out, key, [checkpoint], **ours) as space:
        writer = space.write_shards(shards)
        run = StreamingPass(checkpoint, plan, tensors, writer, space, report)
        if plan.needs_activations and tokens is not None:
            run.with_activations(tokens, device, key)
        else:
            run.without_activations()
        writer.close()
        records = tuple(run.records[index] for index in sorted(run.records))
        folder = space.result
        done = achieved(checkpoint, plan, records)
        if ranks.rank == 0:
            with writing(folder):
                write_hashes(folder, writer)
                write_companions(
                    checkpoint, plan, folder, shards, records, tokens, stats, done
                )
    return CutResult(
        out=out,
        bytes_written=writer.bytes_written,
        file_bytes=sum(shard.file_bytes for shard in shards),
        forward_passes=plan.forward_passes,
        records=records,
        achieved=done,
    )


def finished_cut(checkpoint: Checkpoint, plan: CutPlan, out: Path) -> CutResult:
    """What a cut that is complete did, by its provenance.

    Raises:
        CheckpointError: The provenance is damaged.
    """
    records, done = read_records(checkpoint, plan, out)
    return CutResult(
        out=out,
        bytes_written=0,
        file_bytes=sum(path.stat().st_size for path in out.glob("*.safetensors")),
        forward_passes=plan.forward_passes,
        records=records,
        achieved=done,
    )

"""Recovery: train a pruned checkpoint and write it again, file by file the same.

    check -> loss on windows kept apart -> train -> write -> the loss again -> publish

Routers are trained one layer at a time beside the original model
(``router_distillation.py``); adapters, full finetuning and routers taught from end to
end have the model in memory (``train.py``), a teacher is streamed (``teacher.py``).
Either way what was trained is kept until the output is complete, so that a killed run
continues.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError

from .. import __version__
from ..calibrate.data import Tokens, load_heldout, load_tokens
from ..calibrate.forward import StreamingModel
from ..calibrate.perplexity import summed_loss
from ..calibrate.text import EXAMPLE
from ..checkpoint.open import Checkpoint
from ..checkpoint.reader import DTYPES
from ..checkpoint.source import open_checkpoint
from ..checkpoint.tensor_hashes import write_hashes
from ..checkpoint.writer import JOURNAL_NAME, ShardPlan
from ..cut.finish import PROVENANCE
from ..cut.output import RECOVERED, companions_sha256
from ..cut.transaction import Workspace, is_complete, output_transaction
from ..errors import (
    CalibrationError,
    CheckpointError,
    OutputError,
)
from ..files.atomic import writing
from ..files.json_file import read_json
from ..progress import Progress, Report, ignore
from ..recipes.schema import Calibration, first_problem
from .check import check_recovery
from .options import Training
from .router_distillation import Distillation, LayerError
from .teacher import Lesson
from .write import (
    load_trained,
    read_history,
    same_shards,
    save_trained,
    write_record,
    write_rest,
    write_weights,
)

TRAINED = "trained.safetensors"


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """What a recovery did."""

    out: Path
    training: Training
    loss_before: float
    """Nats per token, on windows of the text that were not trained on."""
    loss_after: float
    """The same of the output, read back."""
    divergence: tuple[float, float] | None
    """KL from the teacher on the same windows, before and after, in nats per token;
    None: there was none."""
    tensors: int
    """Those that were trained."""
    parameters: int
    """Weights in them, zeros not counted."""
    layers: tuple[LayerError, ...]
    """What distillation changed; empty for other methods."""
    file_bytes: int


def recover(
    checkpoint: Checkpoint,
    original: Checkpoint | None,
    out: Path,
    training: Training,
    calibration: Calibration,
    *,
    device: str = "cpu",
    resume: bool = False,
    overwrite: bool = False,
    report: Report = ignore,
) -> Recovered:
    """Write a trained copy of ``checkpoint`` to ``out``.

    Args:
        checkpoint: What was cut.
        original: What it was cut from, where that is what is learnt from.
        out: The output folder, which appears when everything is in it.
        training: How to train.
        calibration: The text; ``heldout`` windows of it are kept apart to judge on.
        device: Where to train.
        resume: Continue an interrupted run.
        overwrite: Replace an existing output once the new one is complete.
        report: Called while it goes on.

    Raises:
        RecipeError: See ``check_recovery``, as for the next two.
        RemapError: The original is another.
        CalibrationError: The text cannot be used, or is too short.
        OutputError: See ``output_transaction``.
    """
    check_recovery(checkpoint, original, training)
    history = read_history(checkpoint)
    before = StreamingModel(checkpoint, device)
    if calibration.source is None:
        raise CalibrationError(
            "calibration text is needed to train on: pass a text file with "
            "--calibration FILE, or a data set of the Hub, such as --calibration "
            f"{EXAMPLE}."
        )
    tokens = load_tokens(checkpoint, calibration)
    heldout = load_heldout(checkpoint, calibration)
    shards, stored = same_shards(checkpoint)
    key = _key(checkpoint, original, training, (tokens, heldout), shards)
    sources = [checkpoint] if original is None else [checkpoint, original]
    if is_complete(out, key, resume=resume, overwrite=overwrite):
        return _earlier(out, training, shards)
    with output_transaction(
        out, key, sources, resume=resume, overwrite=overwrite
    ) as space:
        writer = space.write_shards(shards)
        loss_before = _mean_loss(before, heldout, report, "before")
        lesson = None
        if training.objective == "teacher":
            assert original is not None
            lesson = Lesson(original, tokens, heldout, device, report)
        kl_before = None if lesson is None else lesson.missed(before)
        changed, layers = _train(
            checkpoint,
            original,
            training,
            tokens,
            heldout,
            lesson,
            space,
            device,
            report,
        )
        write_weights(writer, stored, changed)
        writer.close()
        with writing(space.result):
            write_hashes(space.result, writer)
            write_rest(checkpoint, space.result)
        # Judged as it lies on the disk, not as it was in memory.
        written = StreamingModel(open_checkpoint(space.result), device)
        loss_after = _mean_loss(written, heldout, report, "after")
        divergence = None
        if lesson is not None and kl_before is not None:
            divergence = kl_before, lesson.missed(written)
        counts = [int(torch.count_nonzero(tensor)) for tensor in changed.values()]
        result = Recovered(
            out=out,
            training=training,
            loss_before=loss_before,
            loss_after=loss_after,
            divergence=divergence,
            tensors=len(changed),
            parameters=sum(counts),
            layers=layers,
            file_bytes=sum(shard.file_bytes for shard in shards),
        )
        with writing(space.result):
            # Provenance holds the loss of the output, so it comes after the weights.
            record = as_record(checkpoint, result, tokens, heldout)
            write_record(checkpoint, space.result, history, record)
    return result


def _key(
    checkpoint: Checkpoint,
    original: Checkpoint | None,
    training: Training,
    texts: Sequence[Tokens],
    shards: Sequence[ShardPlan],
) -> str:
    """Hash of everything that determines the output's bytes."""
    teacher = None if original is None else original.fingerprint
    # The repr of a dataclass has every field: all options are in the key.
    said = (__version__, training, checkpoint.fingerprint, teacher)
    digest = hashlib.sha256(repr(said).encode())
    for part in (companions_sha256(checkpoint), *(text.sha256 for text in texts)):
        digest.update(part.encode())
    for shard in shards:
        digest.update(shard.header)
    return digest.hexdigest()


def _earlier(out: Path, training: Training, shards: Sequence[ShardPlan]) -> Recovered:
    """What a finished recovery said of itself.

    Raises:
        CheckpointError: Its provenance is damaged.
    """
    try:
        record = read_json(out / "provenance.json", PROVENANCE)[RECOVERED][-1]
        return Recovered(
            out=out,
            training=training,
            loss_before=record["loss"]["before"],
            loss_after=record["loss"]["after"],
            divergence=_both(record.get("divergence")),
            tensors=record["tensors"],
            parameters=record["parameters"],
            layers=tuple(LayerError(**layer) for layer in record["layers"]),
            file_bytes=sum(shard.file_bytes for shard in shards),
        )
    except (KeyError, IndexError, TypeError) as error:
        raise CheckpointError(
            f"{out / 'provenance.json'}: is damaged: {error!r}. Make the output again "
            "with --overwrite."
        ) from error


def _both(found: dict[str, float] | None) -> tuple[float, float] | None:
    return None if found is None else (found["before"], found["after"])


def as_record(
    checkpoint: Checkpoint, result: Recovered, tokens: Tokens, heldout: Tokens
) -> dict[str, object]:
    """What provenance.json says of it."""
    return {
        **dataclasses.asdict(result.training),
        "input_fingerprint": checkpoint.fingerprint,
        "calibration": tokens.describe(),
        "heldout": heldout.describe(),
        "loss": {"before": result.loss_before, "after": result.loss_after},
        **_divergence(result),
        "tensors": result.tensors,
        "parameters": result.parameters,
        "layers": [dataclasses.asdict(layer) for layer in result.layers],
    }


def _divergence(result: Recovered) -> dict[str, object]:
    if result.divergence is None:
        return {}
    before, after = result.divergence
    return {"divergence": {"before": before, "after": after}}


def _mean_loss(
    model: StreamingModel, heldout: Tokens, report: Report, stage: str
) -> float:
    def tell(progress: Progress) -> None:
        report(dataclasses.replace(progress, stage=stage))

    total, count = summed_loss(model, heldout.ids_ST, heldout.source, tell)
    return total / count


def _train(
    checkpoint: Checkpoint,
    original: Checkpoint | None,
    training: Training,
    tokens: Tokens,
    heldout: Tokens,
    lesson: Lesson | None,
    space: Workspace,
    device: str,
    report: Report,
) -> tuple[dict[str, torch.Tensor], tuple[LayerError, ...]]:
    """What changed, by tensor; of distillation also what each layer made of it."""
    if original is not None and lesson is None:
        # Held-out windows run along, so that each layer can be judged on them.
        ids_ST = torch.cat([tokens.ids_ST, heldout.ids_ST])
        teacher, taught = (
            StreamingModel(one, device) for one in (original, checkpoint)
        )
        by_layer = Distillation(teacher, taught, training, ids_ST, len(heldout.ids_ST))
        return _distil(checkpoint, by_layer, training, space, report)
    kept = space.work / TRAINED
    # The training had ended before the kill; what is left is to write.
    if kept.is_file():
        return load_trained(kept, checkpoint), ()
    # Only here: peft and accelerate, which it needs, are an extra.
    from .train import train

    changed = train(
        checkpoint,
        training,
        tokens.ids_ST,
        lesson,
        device=device,
        work=space.work,
        report=report,
    )
    save_trained(kept, changed)
    return changed, ()


def _distil(
    checkpoint: Checkpoint,
    lesson: Distillation,
    training: Training,
    space: Workspace,
    report: Report,
) -> tuple[dict[str, torch.Tensor], tuple[LayerError, ...]]:
    done = {
        error.layer: error
        for line in space.journal
        if isinstance(fields := line.get("distilled"), dict)
        for error in [_layer_error(fields)]
    }
    layers = checkpoint.decoder_layers
    tell = _steps_of(sum(layer.has_moe for layer in layers) * training.steps, report)
    tell(0)
    changed: dict[str, torch.Tensor] = {}
    for layer in layers:
        name = checkpoint.layout.router.name(layer.index)
        kept = space.work / f"router-{layer.index:05d}.safetensors"
        if layer.index in done:
            changed |= load_trained(kept, checkpoint)
            # Run but not trained: later layers read what this one gives.
            lesson.layer(layer, changed[name])
            tell(training.steps)
            continue
        found = lesson.layer(layer, step=lambda: tell(1))
        if found is None:
            continue
        rows_RD, error = found
        changed[name] = rows_RD.to(DTYPES[checkpoint.tensors[name].dtype])
        # Before the journal's line, which vouches for the file.
        save_trained(kept, {name: changed[name]})
        done[layer.index] = error
        entry: dict[str, object] = {"distilled": dataclasses.asdict(error)}
        space.record(entry)
    return changed, tuple(done[index] for index in sorted(done))


def _layer_error(fields: dict[str, object]) -> LayerError:
    """A line of the journal.

    Raises:
        OutputError: It says something else.
    """
    try:
        return TypeAdapter(LayerError).validate_python(fields)
    except ValidationError as error:
        raise OutputError(
            f"{JOURNAL_NAME}: a line does not describe a layer: "
            f"{first_problem(error)}. Pass --overwrite to start again."
        ) from error


def _steps_of(total: int, report: Report) -> Callable[[int], None]:
    """Counts steps and tells of them."""
    done = 0

    def tell(steps: int) -> None:
        nonlocal done
        done += steps
        report(
            Progress(
                stage="distil",
                layer=0,
                layers=0,
                bytes_done=done,
                bytes_total=total,
                counted="steps",
            )
        )

    return tell

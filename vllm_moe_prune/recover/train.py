"""Adapters, all weights or routers by transformers' Trainer, on the model in memory.

Axes: S windows, T tokens of a window.
"""

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from ..checkpoint.index import TensorInfo
from ..checkpoint.open import Checkpoint
from ..checkpoint.reader import DTYPES, read_tensor
from ..errors import CheckpointError, OutputError, RecipeError
from ..files.atomic import RESUME, remove_folder, write_file, writing
from ..progress import Progress, Report
from .lora import merged, with_adapters
from .model import Block, Place, TrainableModel, keep_zeros
from .options import Training, patterns
from .teacher import Lesson

# How often a run that is killed can be continued from, in parts of the steps.
SAVES = 10
MAX_GRADIENT_NORM = 1.0
SAVED = "complete"
"""A file in a save that is whole."""


def train(
    checkpoint: Checkpoint,
    training: Training,
    ids_ST: torch.Tensor,
    lesson: Lesson | None = None,
    *,
    device: str,
    work: Path,
    report: Report,
) -> dict[str, torch.Tensor]:
    """Train, and give the tensors that changed, whole, in their stored dtypes.

    Args:
        checkpoint: What to train; it is read into memory.
        training: How.
        ids_ST: Windows of text.
        lesson: The teacher's distributions for them; None: the text is the aim.
        device: cpu or cuda.
        work: What a killed run left to continue from, if anything, and will leave.
        report: Called after each step.

    Raises:
        CheckpointError: A weight to be trained is not stored as plain numbers, or is
            no number after the training.
        RecipeError: Nothing of what is to be trained is there.
    """
    # Adapters draw their A at random.
    torch.manual_seed(training.seed)
    model = TrainableModel(checkpoint)
    model.teacher = None if lesson is None else lesson.teacher
    if training.method == "full" or model.embedding.weight.dtype == torch.float16:
        # Small steps vanish in 16 bits, and small gradients in those of fp16.
        model.float()
    elif training.method == "router":
        # Adam's small steps would vanish in bf16; what is not trained needs no fp32.
        for block in model.blocks:
            if isinstance(block, Block) and block.moe is not None:
                block.moe.router.float()
    known = patterns(checkpoint.arch)
    pattern = "|".join(f"({known[name]})" for name in training.targets)
    chosen = _chosen(checkpoint, model, pattern, training)
    trained: Any = model
    if training.method == "lora":
        trained = with_adapters(model, pattern, training.rank)
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen)
            if name in chosen:
                keep_zeros(parameter)
    states_STD = None if lesson is None else lesson.states_STD
    _run(trained, training, _Windows(ids_ST, states_STD), device, work, report)
    plain = merged(trained) if training.method == "lora" else model
    return _stored(checkpoint, plain, chosen)


def _chosen(
    checkpoint: Checkpoint, model: TrainableModel, pattern: str, training: Training
) -> dict[str, Place]:
    """The weights to be trained, each stored as plain numbers."""
    found = {
        name: place
        for name, place in model.places.items()
        if re.fullmatch(pattern, name.rpartition(".")[0])
        and (training.method != "lora" or name.endswith(".weight"))
    }
    if not found:
        raise RecipeError(
            f"{checkpoint.folder}: has no {' or '.join(training.targets)} to train; "
            "choose other --targets."
        )
    for place in found.values():
        info = checkpoint.tensors[place.tensor]
        if type(info) is not TensorInfo:
            raise CheckpointError(
                f"{checkpoint.folder}: {info.name} is stored without its zeros, which "
                "training cannot change. Convert it (vllm-moe-prune convert IN OUT "
                "--storage dense), or train other --targets, such as attention."
            )
    return found


class _Windows(Dataset[dict[str, torch.Tensor]]):
    def __init__(
        self, ids_ST: torch.Tensor, states_STD: torch.Tensor | None = None
    ) -> None:
        self.ids_ST, self.states_STD = ids_ST, states_STD

    def __len__(self) -> int:
        return len(self.ids_ST)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        # Not shifted: TrainableModel.forward does that.
        found = {"input_ids": self.ids_ST[index], "labels": self.ids_ST[index]}
        if self.states_STD is not None:
            found["aim"] = self.states_STD[index]
        return found


class _ProgressCallback(TrainerCallback):
    def __init__(self, report: Report) -> None:
        self.report = report

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.on_step_end(args, state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.report(
            Progress(
                stage="train",
                layer=0,
                layers=0,
                bytes_done=state.global_step,
                bytes_total=state.max_steps,
                counted="steps",
            )
        )


class _Trainer(Trainer):
    """Keeps one save, which counts once all of it is on the disk."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        work = Path(self.args.output_dir)
        newest = work / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        # torch's writer says RuntimeError, and Rust's its own, where a disk is full.
        except (OSError, RuntimeError, SafetensorError) as error:
            raise OutputError(
                f"{newest}: cannot be written: {first_line(error)}. Free space or mend "
                f"the disk, then {RESUME}."
            ) from error
        with writing(newest):
            # The mark comes last, and only then does the older save go.
            write_file(newest / SAVED, b"")
            for older in work.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
                if older != newest:
                    remove_folder(older)


def first_line(error: Exception) -> str:
    """What an error says, without what may follow on further lines."""
    return str(error).strip().split("\n")[0].rstrip(".")


def _run(
    model: Any,
    training: Training,
    windows: _Windows,
    device: str,
    work: Path,
    report: Report,
) -> None:
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=training.steps,
        per_device_train_batch_size=training.batch_size,
        learning_rate=training.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(training.warmup * training.steps),
        weight_decay=0.0,
        max_grad_norm=MAX_GRADIENT_NORM,
        # fp32 weights are multiplied in bf16 where that is what devices are made for.
        bf16=training.method == "full" and device != "cpu",
        use_cpu=device == "cpu",
        seed=training.seed,
        save_strategy="steps",
        save_steps=max(1, training.steps // SAVES),
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=device != "cpu",
        remove_unused_columns=False,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several would get copies of it all
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=windows,
        callbacks=[_ProgressCallback(report)],
    )
    # It prints to stdout, which is the result's.
    trainer.remove_callback(PrinterCallback)
    # get_last_checkpoint takes the highest number, whole or not.
    for save in work.glob("checkpoint-*"):
        if not (save / SAVED).is_file():
            shutil.rmtree(save)
    last = get_last_checkpoint(str(work)) if work.is_dir() else None
    trainer.train(resume_from_checkpoint=last)


def _stored(
    checkpoint: Checkpoint, model: TrainableModel, chosen: dict[str, Place]
) -> dict[str, torch.Tensor]:
    """Whole tensors of the checkpoint with what was trained in them."""
    parameters = dict(model.named_parameters())
    changed: dict[str, torch.Tensor] = {}
    for name, place in chosen.items():
        info = checkpoint.tensors[place.tensor]
        weight = parameters[name].detach().to("cpu", DTYPES[info.dtype])
        if not bool(torch.isfinite(weight).all()):
            raise CheckpointError(
                f"{info.name}: NaN or infinity after the training. Choose a lower "
                "--learning-rate."
            )
        if place.row is None:
            changed[info.name] = weight
            continue
        # Packed experts: rows that were not trained stay as they are stored.
        if info.name not in changed:  # a packed tensor is read once, not per expert
            changed[info.name] = read_tensor(info)
        part = changed[info.name][place.row]
        if place.half is not None:
            # A view, so that copy_ reaches the whole tensor.
            part = part.chunk(2, dim=0)[place.half]
        part.copy_(weight)
    return changed

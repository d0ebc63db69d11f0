"""The command that trains a checkpoint again after a cut."""

import time
from pathlib import Path
from typing import Annotated

import typer

from .flags import (
    RESUME,
    Device,
    Json,
    Length,
    Overwrite,
    Resume,
    Revision,
    Samples,
    Text,
    flag,
)


def recover(
    pruned: Annotated[str, typer.Argument(help="A pruned checkpoint folder.")],
    output: Annotated[Path, typer.Argument(help="Output folder.")],
    method: Annotated[
        str, flag("router (needs --source), lora, or full; the last two train on text.")
    ],
    source: Annotated[
        str | None, flag("For router: the original that was cut, folder or Hub id.")
    ] = None,
    revision: Revision = None,
    targets: Annotated[
        str | None,
        flag(
            "What to train, with commas: attention, experts, dense, router, norms, "
            "embeddings. lora: attention if not given; full: all."
        ),
    ] = None,
    steps: Annotated[int, flag("Optimizer steps; of router per layer.")] = 200,
    batch_size: Annotated[int, flag("Windows of text per step.")] = 8,
    learning_rate: Annotated[
        float | None, flag("Highest; router 3e-3, lora 5e-4, full 1e-5 if not given.")
    ] = None,
    warmup: Annotated[
        float, flag("Share of the steps in which it rises; then a cosine to 0.")
    ] = 0.03,
    rank: Annotated[int, flag("Of lora's adapters.")] = 16,
    calibration: Text = None,
    samples: Samples = None,
    sequence_length: Length = None,
    heldout: Annotated[
        int | None, flag("Windows kept apart, on which the loss is told.")
    ] = None,
    seed: Annotated[int, flag("Chooses the windows and their order.")] = 0,
    device: Device = "cpu",
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Train a pruned checkpoint: routers alone, adapters (merged), or everything.

    Weights that are zero stay zero, files keep their storage, and what is not trained
    is copied byte for byte. Routers are trained layer by layer in bounded memory;
    for lora and full the model has to fit.

    Example: `vllm-moe-prune recover OUT REC --method lora --calibration c4.txt`

    Example: `vllm-moe-prune recover OUT REC --method router --source CKPT`
    """
    from .. import pipeline
    from ..checkpoint.source import open_checkpoint
    from ..recipes.loading import with_overrides
    from ..recipes.schema import Recipe
    from ..recover.options import training
    from .output.draw import resumable, watching
    from .output.show_recovered import show_recovered

    started = time.monotonic()
    pipeline.check_device(device)
    checkpoint = open_checkpoint(pruned)
    asked = training(
        checkpoint.arch,
        method,
        targets=targets,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        warmup=warmup,
        rank=rank,
        seed=seed,
    )
    original = open_checkpoint(source, revision) if source is not None else None
    flags = {
        "calibration": calibration,
        "samples": samples,
        "sequence_length": sequence_length,
        "heldout": heldout,
        "seed": seed,
    }
    text = with_overrides(Recipe(), flags).calibration
    with resumable(RESUME), watching(as_json) as report:
        options = pipeline.RunOptions(
            device=device, resume=resume, overwrite=overwrite, report=report
        )
        result = pipeline.recover(checkpoint, original, output, asked, text, options)
    show_recovered(result, time.monotonic() - started, as_json)

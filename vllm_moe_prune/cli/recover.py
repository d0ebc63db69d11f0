"""The command that trains a checkpoint again after a cut."""

import time
from pathlib import Path
from typing import Annotated

import typer

from .flags import (
    RESUME,
    AllowLinks,
    Device,
    Json,
    Length,
    Overwrite,
    Resume,
    Revision,
    Samples,
    Text,
    TrustCode,
    chosen_device,
    flag,
)


def recover(
    pruned: Annotated[str, typer.Argument(help="A pruned checkpoint folder.")],
    output: Annotated[Path, typer.Argument(help="Output folder.")],
    method: Annotated[str, flag("router (needs --source or --teacher), lora or full.")],
    source: Annotated[
        str | None,
        flag(
            "Original checkpoint, folder or Hub id, for method router: its layers' "
            "outputs are approached, one layer at a time."
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        flag(
            "Original checkpoint, for any method: its next-token distribution is "
            "approached (KL) instead of the text. It is streamed."
        ),
    ] = None,
    revision: Revision = None,
    trust_remote_code: TrustCode = False,
    allow_links: AllowLinks = False,
    targets: Annotated[
        str | None,
        flag(
            "Parts to train, comma-separated: attention, experts, dense, router, "
            "norms, embeddings. Default: attention for lora, all for full."
        ),
    ] = None,
    steps: Annotated[
        int, flag("Optimizer steps; per layer for router with --source.")
    ] = 200,
    batch_size: Annotated[int, flag("Windows of text per step.")] = 8,
    learning_rate: Annotated[
        float | None,
        flag("Peak value. Default: 3e-3 for router, 5e-4 for lora, 1e-5 for full."),
    ] = None,
    warmup: Annotated[
        float, flag("Share of steps with a rising learning rate; cosine decay follows.")
    ] = 0.03,
    rank: Annotated[int, flag("Rank of the LoRA adapters.")] = 16,
    calibration: Text = None,
    samples: Samples = None,
    sequence_length: Length = None,
    heldout: Annotated[
        int | None, flag("Number of held-out windows for the loss before and after.")
    ] = None,
    seed: Annotated[int, flag("Seed for choosing and ordering the windows.")] = 0,
    device: Device = "auto",
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Train a pruned checkpoint: routers, LoRA adapters (merged), or all weights.

    Zeros stay zero, the storage stays the same, and weights that are not trained are
    copied byte for byte. Method router with --source trains layer by layer in bounded
    memory; all else holds the pruned model in memory.

    Example: `vllm-moe-prune recover OUT REC --method lora --calibration c4.txt`

    Example: `vllm-moe-prune recover OUT REC --method router --source CKPT`

    Example: `vllm-moe-prune recover OUT REC --method lora --teacher CKPT`
    """
    from .. import pipeline
    from ..checkpoint.source import open_checkpoint
    from ..errors import RecipeError
    from ..recipes.flags import with_overrides
    from ..recipes.schema import Recipe
    from ..recover.options import training
    from .output.draw import resumable, watching
    from .output.show_recovered import show_recovered

    started = time.monotonic()
    # Before checkpoints are opened, which may fetch them from the Hub.
    device = chosen_device(device)
    checkpoint = open_checkpoint(
        pruned, trust_code=trust_remote_code, allow_links=allow_links
    )
    asked = training(
        checkpoint.arch,
        method,
        taught=teacher is not None,
        targets=targets,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        warmup=warmup,
        rank=rank,
        seed=seed,
    )
    if source is not None and teacher is not None:
        raise RecipeError("give --source or --teacher, not both.")
    named = source or teacher
    original = (
        open_checkpoint(named, revision, allow_links=allow_links)
        if named is not None
        else None
    )
    flags = {
        "calibration": calibration,
        "samples": samples,
        "sequence_length": sequence_length,
        "heldout": heldout,
        "seed": seed,
    }
    # A recipe for its calibration alone: the same defaults, the same checks.
    text = with_overrides(Recipe(), flags).calibration
    with resumable(RESUME), watching(as_json) as report:
        options = pipeline.RunOptions(
            device=device, resume=resume, overwrite=overwrite, report=report
        )
        result = pipeline.recover(checkpoint, original, output, asked, text, options)
    show_recovered(result, time.monotonic() - started, as_json)

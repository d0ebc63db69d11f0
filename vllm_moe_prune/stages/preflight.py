"""Checks before any work is done: what cannot be finished is not begun."""

from dataclasses import dataclass
from pathlib import Path

import torch

from ..checkpoint.open import Checkpoint
from ..checkpoint.output_path import check_folder
from ..checkpoint.reader import check_routers
from ..checkpoint.writer import MAX_SHARD_BYTES
from ..cut.convert import StorageName
from ..cut.output import companions
from ..cut.predict import model_facts
from ..cut.transaction import check_output
from ..cut.validate_plan import check_stored
from ..decide import build_plan
from ..errors import RecipeError
from ..progress import Report, ignore
from ..recipes.schema import Recipe


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How to run, as opposed to what to do (that is the recipe's)."""

    device: str = "cpu"
    resume: bool = False
    overwrite: bool = False
    max_shard_bytes: int = MAX_SHARD_BYTES
    report: Report = ignore
    storage: StorageName = "dense"
    """How the output stores expert weights."""


def check_options(checkpoint: Checkpoint, out: Path, options: RunOptions) -> None:
    """Refuse what cannot work, before any work is done.

    Raises:
        RecipeError: The device is not there.
        OutputError: The output is in the way, cannot be written, or is the input.
        CheckpointError: A router holds NaN, or a file beside the weights is a trap.
    """
    check_device(options.device)
    check_folder(out, checkpoint.folder)
    check_output(out, resume=options.resume, overwrite=options.overwrite)
    check_routers(checkpoint)
    companions(checkpoint)


def check_device(name: str) -> None:
    """Refuse a device that is unknown or not in this machine.

    Raises:
        RecipeError: Saying which there are.
    """
    there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if name not in there and not (name == "cuda" and len(there) > 1):
        raise RecipeError(
            f"device {name!r} is not one of this machine's: {', '.join(there)}."
        )


def check_recipe(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Refuse what no statistics could make possible, before measuring them.

    Raises:
        RecipeError: What was asked for cannot be done with this checkpoint.
        PlanError: Its weights are stored in a way that does not allow it.
    """
    quantizes = recipe.quantize.method != "none"
    check_stored(checkpoint, zeros=recipe.asks_zeros, quantizes=quantizes)
    build_plan.check_recipe(recipe, model_facts(checkpoint))

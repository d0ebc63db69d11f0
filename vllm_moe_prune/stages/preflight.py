"""Checks before any work is done: what cannot be finished is not begun."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from ..calibrate.data import Tokens
from ..calibrate.shared_experts import agree_on
from ..checkpoint.open import Checkpoint
from ..checkpoint.output_path import check_folder
from ..checkpoint.reader import check_routers
from ..checkpoint.writer import MAX_SHARD_BYTES
from ..cut.build_remap import build_remap
from ..cut.card import source_card
from ..cut.config import pruned_config
from ..cut.convert import StorageName
from ..cut.output import companions
from ..cut.predict import model_facts
from ..cut.spell import check_form, check_spelling
from ..cut.transaction import check_output
from ..cut.validate_plan import check_stored, fixed_form
from ..decide import build_plan
from ..decide.check_plan import check_plan
from ..decide.cut_plan import CutPlan
from ..errors import PlanError, RecipeError
from ..progress import Report, ignore
from ..ranks.group import ALONE, Ranks
from ..ranks.launched import local_rank
from ..recipes.schema import Recipe, Spelling

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How to run, as opposed to what to do (that is the recipe's)."""

    device: str = "cpu"
    resume: bool = False
    overwrite: bool = False
    max_shard_bytes: int = MAX_SHARD_BYTES
    report: Report = ignore
    ranks: Ranks = ALONE
    """The processes that share the work."""
    storage: StorageName | None = None
    """How the output stores expert weights; None: as recipe or plan say."""
    spelling: Spelling = "moe-prune"
    """For whom ``convert`` writes layers that differ; a cut goes by its plan."""


def check_ranks(
    checkpoint: Checkpoint, options: RunOptions, tokens: Tokens | None, **what: object
) -> None:
    """Refuse ranks that were not started on the same.

    Args:
        checkpoint: What they share the work on.
        options: Says who they are.
        tokens: The calibration tokens.
        what: What else is to be the same, by the names that errors use.

    Raises:
        RanksError: Naming the first rank that differs from rank 0, and in what.
    """
    text = tokens and tokens.sha256
    kind = torch.device(options.device).type
    agree_on(options.ranks, checkpoint, calibration_text=text, device=kind, **what)


def validate_input(checkpoint: Checkpoint, device: str) -> None:
    """Refuse what no forward pass could run on.

    Raises:
        RecipeError: The device is not there.
        CheckpointError: A router holds NaN.
    """
    check_device(device)
    check_routers(checkpoint)


def validate_output(checkpoint: Checkpoint, out: Path, options: RunOptions) -> None:
    """Refuse an output that could not be written, or not completely.

    Raises:
        OutputError: It is in the way, cannot be written, or is the input.
        CheckpointError: A file beside the weights cannot be copied.
    """
    check_folder(out, checkpoint.folder)
    check_output(out, resume=options.resume, overwrite=options.overwrite)
    # Called for their errors: what lies beside the weights must be fit to copy.
    companions(checkpoint)
    source_card(checkpoint)


def validate_plan(
    checkpoint: Checkpoint, plan: CutPlan, options: RunOptions, where: str
) -> None:
    """Refuse a plan that does not fit; stages that execute it trust it.

    Raises:
        PlanError: It is of another checkpoint, or cannot be stored as asked.
    """
    check_plan(plan, checkpoint.layers, checkpoint.fingerprint, where)
    fixed = fixed_form(checkpoint)
    if plan.recipe.experts.refit != "none" and fixed is not None:
        log.warning(
            "%s: experts stay %s, so none are refitted. Start from bf16 weights to "
            "have them refitted.",
            where,
            fixed,
        )
    stored = options.storage or plan.recipe.storage
    if stored != "dense" and plan.is_quantized:
        raise PlanError(
            f"{where}: quantizes experts, which --storage {stored} cannot "
            "store. Leave --storage out."
        )
    if plan.spelling == "stock-vllm":
        check_spelling(checkpoint, plan)
        if stored != "dense":
            raise PlanError(
                f"{where}: is for stock vLLM, which --storage {stored} is not. Leave "
                "--storage out."
            )
    # What config.json cannot say of the output is refused before anything runs.
    pruned_config(checkpoint, plan, build_remap(checkpoint, plan))


def device_of(name: str) -> str:
    """What ``auto`` stands for: CUDA's current device if there is one, else the CPU.

    Of several ranks on a machine each takes one of its own.
    """
    if name != "auto":
        return name
    if not torch.cuda.is_available():
        return "cpu"
    rank = local_rank()
    return "cuda" if rank is None else f"cuda:{rank % torch.cuda.device_count()}"


def check_device(name: str) -> None:
    """Refuse a device that is unknown or not in this machine.

    Raises:
        RecipeError: Saying which there are.
    """
    there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    # Plain cuda is PyTorch's current device, if there is any.
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
    narrows = recipe.narrow.is_asked
    check_stored(
        checkpoint, zeros=recipe.asks_zeros, quantizes=quantizes, narrows=narrows
    )
    if recipe.spelling == "stock-vllm" and recipe.experts.budget != "per-layer":
        check_form(checkpoint, masked=recipe.routing == "drop")
    build_plan.check_recipe(recipe, model_facts(checkpoint))

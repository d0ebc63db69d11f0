"""The ``measure`` stage: one forward pass, then what has to be tried out."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from ..calibrate import routed
from ..calibrate.accumulate import measure as measure_checkpoint
from ..calibrate.data import Tokens, load_heldout, load_tokens
from ..calibrate.forward import StreamingModel
from ..calibrate.stats import Stats
from ..calibrate.stats_file import load_stats, save_stats
from ..checkpoint.file_state import check_states
from ..checkpoint.open import Checkpoint
from ..cut.losses import LossJournal
from ..decide.required_stats import needed_statistics, needs_tokens
from ..errors import OutputError
from ..files.atomic import REPEAT, remove_folder, writing
from ..recipes.schema import Calibration, Recipe
from .preflight import RunOptions, check_ranks
from .probe import judging_model, with_owl, with_sensitivity

ROUTER_FIELDS = frozenset({"router_sqdist_EE", "router_norm", "router_row_norm_E"})
LATER = frozenset({"sensitivity_P2", "zeros", "owl_outliers_E", "owl_m"})
"""What is tried out once the rest is known."""


def tokens_of(checkpoint: Checkpoint, calibration: Calibration) -> Tokens:
    """Tokens for a forward pass, which is first seen to be possible."""
    StreamingModel(checkpoint)  # compares config and tensors, reads no weight
    return load_tokens(checkpoint, calibration)


def calibration_tokens(checkpoint: Checkpoint, recipe: Recipe) -> Tokens | None:
    """The calibration tokens, or None where the recipe needs no data at all."""
    # The cut may need activations where no decision needs data.
    if not (needs_tokens(recipe) or recipe.needs_activations):
        return None
    return tokens_of(checkpoint, recipe.calibration)


def measuring_tokens(checkpoint: Checkpoint, recipe: Recipe) -> Tokens | None:
    """The calibration tokens, or None where the decisions need no data."""
    if not needs_tokens(recipe):
        return None
    return tokens_of(checkpoint, recipe.calibration)


def measure(
    checkpoint: Checkpoint,
    recipe: Recipe,
    tokens: Tokens | None,
    options: RunOptions,
    work: Path | None = None,
) -> Stats:
    """Collect what the recipe's decisions need: 0 forward passes, or 1.

    A further one counts OWL's outliers; sensitivities are judged on held-out windows.
    """
    later = needed_statistics(recipe) & LATER
    heldout = None
    if tokens and "sensitivity_P2" in later:
        # Before the pass: a text that is too short is refused at once.
        heldout = load_heldout(checkpoint, recipe.calibration)
    stats = collect(checkpoint, [recipe], tokens, options, work)
    if tokens and heldout:
        kept = None if work is None else work / "losses.jsonl"
        journal = LossJournal(kept, options.ranks)
        stats = with_sensitivity(
            judging_model(checkpoint, options.device),
            recipe,
            stats,
            heldout,
            journal,
            options.report,
            zeros_on=tokens if "zeros" in later else None,
        )
    if tokens and "owl_outliers_E" in later:
        model = StreamingModel(checkpoint, options.device)
        stats = with_owl(model, recipe, stats, tokens, options.report)
    return stats


def measure_into(
    file: Path,
    checkpoint: Checkpoint,
    recipe: Recipe,
    tokens: Tokens | None,
    options: RunOptions,
) -> Stats:
    """Measure into a file; after a kill the same call continues.

    Raises:
        OutputError: It cannot be written, or is no regular file.
        CheckpointError: A file of the checkpoint has changed meanwhile.
        RanksError: Ranks were given different things, or no shared folder.
    """
    ranks = options.ranks
    check_ranks(checkpoint, options, tokens, recipe=sorted(needed_statistics(recipe)))
    ranks.check_shared(file.absolute().parent)
    stats = measure(checkpoint, recipe, tokens, options, _work(file))
    if ranks.rank == 0:
        # Before it is written: files that changed meanwhile make sums of a mixture.
        check_states(checkpoint.folder, checkpoint.files)
        with writing(file, REPEAT):
            file.parent.mkdir(exist_ok=True)
            save_stats(stats, file)
        remove_work(file)
    ranks.wait()
    return stats


def remove_work(file: Path) -> None:
    """Remove what a measurement into a file kept to continue from.

    Raises:
        OutputError: The disk refuses.
    """
    with writing(file, REPEAT):
        remove_folder(_work(file))


def _work(file: Path) -> Path:
    return file.with_name(file.name + ".work")


def collect(
    checkpoint: Checkpoint,
    recipes: Iterable[Recipe],
    tokens: Tokens | None,
    options: RunOptions,
    work: Path | None = None,
) -> Stats:
    """Everything that one pass can find out for several recipes.

    Args:
        checkpoint: The model.
        recipes: Whose decisions are to be made.
        tokens: Calibration tokens, if any recipe needs them.
        options: How to run.
        work: Where to keep what is found until the caller is done with it all.
    """
    recipes = list(recipes)
    needed = frozenset[str]().union(*map(needed_statistics, recipes))
    clusters = any(recipe.experts.method == "stun" for recipe in recipes)
    kept = None
    if work is not None and needed & LATER:
        # Named by what was asked for: what another recipe left may lack something.
        asked = json.dumps([clusters, sorted(needed - LATER)])
        name = hashlib.sha256(asked.encode()).hexdigest()[:16]
        kept = work / f"measured-{name}.safetensors"
    if kept is not None and options.ranks.first(kept.is_file):
        return resumed_stats(kept, tokens)
    # All of it is tried out later: no pass is needed here.
    if needed & LATER and not needed - LATER and tokens is not None:
        calibration = tokens.describe()
        return Stats(
            fingerprint=checkpoint.fingerprint, layers={}, calibration=calibration
        )
    asked_for = needed & routed.FIELDS
    if tokens is not None and tokens.names:
        # What tells how well a plan serves each source, whatever its criterion.
        asked_for |= routed.CONTRIBUTIONS
    stats = measure_checkpoint(
        checkpoint,
        router=clusters or bool(needed & ROUTER_FIELDS),
        weights=clusters,
        tokens=tokens if any(map(needs_tokens, recipes)) else None,
        fields=asked_for,
        device=options.device,
        report=options.report,
        work=work,
        ranks=options.ranks,
    )
    if kept is not None and options.ranks.rank == 0:
        kept.parent.mkdir(parents=True, exist_ok=True)
        save_stats(stats, kept)
    return stats


def resumed_stats(path: Path, tokens: Tokens | None) -> Stats:
    """What an interrupted run measured, if it was of the same text.

    Raises:
        OutputError: It measured another text.
    """
    stats = load_stats(path)
    measured = stats.calibration.get("sha256")
    if measured and tokens is not None and measured != tokens.sha256:
        raise OutputError(
            f"{path}: the interrupted run measured another calibration text. Resume "
            "with that one, or start again with --overwrite."
        )
    return stats

"""Baseline, trim-only, slim-only and both, measured one after the other."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..checkpoint.fingerprint import difference
from ..checkpoint.open import Checkpoint
from ..checkpoint.source import open_checkpoint
from ..cut.convert import StorageName
from ..decide.cut_plan import CutPlan, load_plan
from ..errors import EvaluationError
from ..pipeline import RunOptions, cut
from ..recipes.calibration import Texts
from ..report.figures import save_figure
from .compare import Size, size_of
from .quality import Subject
from .speed import Speed, Sweep, measure_speed, sweep_for
from .trim_slim_roles import ROLES, Role, role_of, slimming_of, trimming_of

PLAN = "plan.json"
MISSING: dict[Role, Callable[[CutPlan], CutPlan]] = {
    "trim-only": trimming_of,
    "slim-only": slimming_of,
}
"""Which roles can be made from the plan of both, and how."""


@dataclass(frozen=True)
class Row:
    """One role, measured."""

    role: Role
    model: str
    size: Size
    speed: Speed


@dataclass(frozen=True)
class Rows:
    """All of them, the baseline first."""

    rows: tuple[Row, ...]
    missing: dict[Role, str]
    """Roles that there are not, and why."""
    sweep: Sweep
    load_average: float
    """Of the machine over the last minute, in the end."""


@dataclass(frozen=True)
class Timing:
    """What is going to be timed, checked; nothing has been made yet."""

    roles: dict[Role, Subject]
    plans: dict[Role, CutPlan]
    """Of the roles that have to be cut first."""
    sweep: Sweep
    calibration: Texts | None


def prepare(
    original: Subject,
    pruned: Sequence[Subject],
    *,
    contexts: Sequence[int] | None,
    new_tokens: int,
    repeats: int,
    flags: Sequence[str],
    calibration: Texts | None,
) -> Timing:
    """Say who plays which role, what has to be cut, and which contexts are timed.

    Args:
        original: The baseline.
        pruned: What was made of it.
        contexts: Prompt lengths in tokens; None: as the model allows.
        new_tokens: Generated after each prompt.
        repeats: Requests per prompt length.
        flags: For vLLM.
        calibration: Text, if cutting a missing role needs it.

    Raises:
        EvaluationError: The checkpoints do not fit together, or a text is missing.
    """
    roles = cast(original, pruned)
    opened = [one.checkpoint for one in roles.values()]
    sweep = sweep_for(opened, contexts, new_tokens, repeats, flags)
    plans = plans_to_make(roles)
    check_calibration(plans.values(), calibration)
    return Timing(roles, plans, sweep, calibration)


def make_missing(
    timing: Timing, folder: Path, options: RunOptions
) -> dict[Role, Subject]:
    """Every role, those that were missing cut into ``folder``."""
    roles, plans = timing.roles, timing.plans
    return roles | make_roles(roles, plans, folder, options, timing.calibration)


def cast(original: Subject, pruned: Sequence[Subject]) -> dict[Role, Subject]:
    """Which checkpoint plays which role.

    Args:
        original: The baseline.
        pruned: What was made of it.

    Raises:
        EvaluationError: Two play the same, or one changes nothing or is no relative.
    """
    found: dict[Role, Subject] = {"baseline": original}
    for one in pruned:
        if one.checkpoint.arch.model_type != original.checkpoint.arch.model_type:
            raise EvaluationError(
                f"{one.source}: is of another family than {original.source}. Give "
                "checkpoints that were made from it."
            )
        role = role_of(one.checkpoint, original.checkpoint, plan_of(one.checkpoint))
        if role in found:
            raise EvaluationError(
                f"{one.source}: is {role}, as {found[role].source} is already. Give "
                "the original and one checkpoint of each kind."
            )
        found[role] = one
    return found


def plan_of(checkpoint: Checkpoint) -> CutPlan | None:
    """The plan that a pruned checkpoint carries."""
    path = checkpoint.folder / PLAN
    return load_plan(path) if path.is_file() else None


def plans_to_make(roles: Mapping[Role, Subject]) -> dict[Role, CutPlan]:
    """The plans of the roles that nobody plays yet but the plan of both tells.

    Raises:
        EvaluationError: Both was made in another way than by one cut of the original.
    """
    if "both" not in roles:
        return {}
    wanted = [role for role in MISSING if role not in roles]
    plan = plan_of(roles["both"].checkpoint)
    original = roles["baseline"].checkpoint
    # A plan numbers its source's experts: after a second cut not the original's.
    if wanted and (
        plan is None or difference(plan.model.fingerprint, original.fingerprint)
    ):
        raise EvaluationError(
            f"{roles['both'].source}: was not made from {roles['baseline'].source} by "
            f"one cut, so its plan does not tell {' or '.join(wanted)}. Give these as "
            "checkpoints too."
        )
    return {role: MISSING[role](plan) for role in wanted if plan is not None}


def check_calibration(plans: Iterable[CutPlan], text: Texts | None) -> None:
    """Refuse plans that need a text nobody named: checkpoints keep but its file's name.

    Raises:
        EvaluationError: Asking for it.
    """
    for plan in plans:
        texts = [one.text for one in plan.recipe.calibration.texts]
        # Without any it was the shipped text, which is always there.
        found = all(one.startswith("hub:") for one in texts)
        if plan.needs_activations and text is None and not found:
            named = " + ".join(texts)
            raise EvaluationError(
                f"slim-only is cut anew and {plan.by_data}: give the text it was "
                f"calibrated on ({named or 'see its provenance.json'}) with "
                "--calibration, or a slim-only checkpoint."
            )


def make_roles(
    roles: Mapping[Role, Subject],
    plans: Mapping[Role, CutPlan],
    folder: Path,
    options: RunOptions,
    text: Texts | None,
) -> dict[Role, Subject]:
    """Cut the checkpoints that nobody gave; those of an earlier call are kept.

    Zeros are stored as the checkpoint that is both stores its own.

    Raises:
        EvaluationError: What an earlier call left is another model's.
        MoePruneError: As ``pipeline.cut``.
    """
    original = roles["baseline"].checkpoint
    made: dict[Role, Subject] = {}
    for role, plan in plans.items():
        out = folder / role
        # Trim-only has no zeros to leave out: it is stored dense.
        compressed = plan.is_slimmed and roles["both"].checkpoint.storage is not None
        storage: StorageName = "bitmask" if compressed else "dense"
        if not out.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            # resume: with --work, what a killed call left is continued.
            asked = replace(options, storage=storage, resume=True)
            cut(original, plan, out, asked, where=role, text=text)
        found = open_checkpoint(out)
        if _decisions(plan_of(found)) != _decisions(plan) or (
            compressed != (found.storage is not None)
        ):
            raise EvaluationError(
                f"{out}: was made from another plan, or stores zeros in another way. "
                "Remove it, or give another folder with --work."
            )
        made[role] = Subject(found, str(out))
    return made


def _decisions(plan: CutPlan | None) -> CutPlan | None:
    """A plan without what is known only later, and without where its text lies."""
    if plan is None:
        return None
    calibration = plan.recipe.calibration.model_copy(
        update={"source": None, "heldout_source": None}
    )
    recipe = plan.recipe.model_copy(update={"calibration": calibration})
    return plan.model_copy(update={"recipe": recipe, "predicted": None})


def not_played(roles: Mapping[Role, Subject]) -> dict[Role, str]:
    """The roles that are left over, and why."""
    others = " and ".join(
        role for role in ROLES if role in roles and role != "baseline"
    )
    return {
        role: f"the checkpoints given are {others or 'the original alone'}"
        for role in ROLES
        if role not in roles
    }


def measure_rows(
    roles: Mapping[Role, Subject], sweep: Sweep, tell: Callable[[str], None]
) -> Rows:
    """Serve and time them all, one at a time.

    Args:
        roles: Who plays what.
        sweep: What is measured.
        tell: Called with what comes next.
    """
    rows = []
    for role in ROLES:
        # One server at a time: two would share memory bandwidth and be slower.
        if role in roles:
            subject = roles[role]
            tell(f"{role}: serving {subject.source}")
            speed = measure_speed(subject, sweep)
            rows.append(Row(role, subject.name, size_of(subject.checkpoint), speed))
    return Rows(tuple(rows), not_played(roles), sweep, os.getloadavg()[0])


def plot_rows(found: Rows, path: Path) -> None:
    """Draw both speeds over the context; bars are from the lowest to the highest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    for place, kind in enumerate(("prefill", "decode"), 1):
        axes = figure.add_subplot(1, 2, place)
        for row in found.rows:
            spreads = [getattr(one, kind) for one in row.speed.contexts]
            median = [one.median for one in spreads]
            axes.errorbar(
                [one.context for one in row.speed.contexts],
                median,
                yerr=[
                    [one.median - one.low for one in spreads],
                    [one.high - one.median for one in spreads],
                ],
                marker="o",
                markersize=4,
                capsize=3,
                linewidth=1.5,
                label=row.role,
            )
        axes.set_title(kind)
        axes.set_xlabel("tokens of context")
        axes.set_ylabel("tokens/s")
        axes.set_xscale("log", base=2)
        # From zero, so that heights compare as speeds do.
        axes.set_ylim(bottom=0)
        axes.grid(visible=True, alpha=0.25)
    axes.legend()
    save_figure(figure, path, dpi=150)

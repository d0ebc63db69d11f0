"""What the commands that help to choose print: recipes, sweeps, searches."""

import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ...checkpoint.open import Checkpoint
from ...progress import gib, peak_rss_bytes
from .draw import duration, err, hint, print_json, table
from .show import source_of

if TYPE_CHECKING:
    from ...decide.cut_plan import CutPlan
    from ...recipes.schema import Recipe
    from ...tune.estimate import Estimate
    from ...tune.judged import Tuned
    from ...tune.recommend import Costs, Recommended


def show_recipes(recipes: "Sequence[Recipe]", as_json: bool) -> None:
    """The shipped recipes."""
    from ...decide.required_stats import needs_tokens

    data = [
        {
            "name": recipe.name,
            "description": recipe.description,
            "needs_calibration": needs_tokens(recipe) or recipe.needs_activations,
            "searches": recipe.tune is not None,
        }
        for recipe in recipes
    ]
    if as_json:
        print_json({"recipes": data})
        return
    rows = [
        (one["name"], "yes" if one["needs_calibration"] else "no", one["description"])
        for one in data
    ]
    about = "what it is for"
    table("Recipes", ("name", "needs text", about), rows, text=[about])
    hint("Next: vllm-moe-prune run CKPT OUT --recipe NAME --calibration TEXT")


def show_recommended(
    checkpoint: Checkpoint, found: "Recommended", as_json: bool
) -> None:
    """The recipes that meet a wish, below the checkpoint as it is."""
    from ...decide.required_stats import needs_tokens

    original = found.original
    data = [
        {
            "recipe": one.recipe.name,
            "description": one.recipe.description,
            "needs_calibration": (
                needs_tokens(one.recipe) or one.recipe.needs_activations
            ),
            **asdict(one.costs),
            "decode_bytes_factor": round(one.faster(original), 4),
        }
        for one in found.choices
    ]
    if as_json:
        print_json(
            {
                "source": source_of(checkpoint),
                "original": asdict(original),
                "recipes": data,
                "left_out": found.left_out,
            }
        )
        return
    rows = [
        (name, *_costs(costs), f"{original.decode_bytes / costs.decode_bytes:.2f}x")
        for name, costs in (
            ("(original)", original),
            *((one.recipe.name, one.costs) for one in found.choices),
        )
    ]
    heads = ("recipe", "weights", "TFLOPs", "read per token", "reduction")
    table("Recipes within the limits", heads, rows)
    for name, why in found.left_out.items():
        hint(textwrap.fill(f"Not listed: {name}: {why}", 79, subsequent_indent="  "))
    hint("TFLOPs are of 2,048 tokens at batch 1; read per token are weights only.")
    name = found.choices[0].recipe.name
    how = name if name.startswith("--for") else f"--recipe {name}"
    hint(f"Next: vllm-moe-prune run {source_of(checkpoint)} OUT {how}")


def _costs(costs: "Costs") -> tuple[str, str, str]:
    read = f"{costs.decode_bytes / 1e6:,.1f} MB"
    return gib(costs.weight_bytes), f"{costs.flops / 1e12:.3g}", read


def show_sweep(plans: "Sequence[tuple[Path, CutPlan]]", as_json: bool) -> None:
    """What each plan of a sweep predicts."""
    data = [
        {
            "plan": str(path),
            "experts": sum(len(layer.keep) for layer in plan.layers),
            "dropped": _dropped(plan),
            "predicted": plan.predicted.model_dump() if plan.predicted else None,
        }
        for path, plan in plans
    ]
    if as_json:
        print_json({"plans": data})
        return
    rows = [
        (
            path.name,
            sum(len(layer.keep) for layer in plan.layers),
            " ".join(str(layer) for layer in _dropped(plan)) or "-",
            f"{plan.predicted.expert_sparsity:.2%}",
            f"{plan.predicted.total_sparsity:.2%}",
            f"{plan.predicted.file_bytes:,}",
        )
        for path, plan in plans
        if plan.predicted is not None
    ]
    heads = ("plan", "experts", "layers dropped", "of experts", "of all", "bytes")
    table(f"Wrote {len(plans)} plans", heads, rows)


def _dropped(plan: "CutPlan") -> list[int]:
    """The layers that lose their MoE sublayer, or leave whole."""
    return [layer.layer for layer in plan.layers if layer.action != "keep"]


def show_estimate(expected: "Estimate") -> None:
    """What a search is about to take; on stderr, as it is no result."""
    rate = expected.flops_per_second
    lines = (
        f"{expected.candidates} candidates: at least {expected.flops / 1e12:.3g} "
        f"TFLOP of forwards ({duration(expected.floor_s)} at {rate / 1e9:,.0f} "
        f"GFLOP/s)",
        f"  and {gib(expected.bytes_read)} read; about {duration(expected.seconds)}",
    )
    for line in lines:
        err.print(line, style="dim")


def show_tuned(
    checkpoint: Checkpoint,
    tuned: "Sequence[Tuned]",
    plans: Sequence[Path],
    expected: "Estimate",
    took_s: float,
    as_json: bool,
) -> None:
    """What ``tune`` found: for each size the best and its rivals."""
    pairs = list(zip(tuned, plans, strict=True))
    if as_json:
        data = [_tuned_data(one, path) for one, path in pairs]
        shared = {
            "floor_flops": expected.flops,
            "floor_bytes": expected.bytes_read,
            "took_s": round(took_s, 3),
            "peak_rss_bytes": peak_rss_bytes(),
        }
        # One size: its own keys, as ever.
        print_json(
            {**data[0], **shared} if len(data) == 1 else {"sizes": data, **shared}
        )
        return
    for one, path in pairs:
        _show_tuned(one, len(pairs) > 1)
        hint(f"Next: vllm-moe-prune cut {source_of(checkpoint)} --plan {path} -o OUT")
    flops = expected.flops
    hint(
        f"Took {duration(took_s)}; {flops / 1e12:.3g} TFLOP of forwards would take "
        f"{duration(expected.floor_s)}."
    )


def _tuned_data(tuned: "Tuned", path: Path) -> dict[str, object]:
    from ...calibrate.perplexity import perplexity_of
    from ...tune.front import front

    finals = [one for one in tuned.judged if one.final]
    return {
        "plan": str(path),
        "size": asdict(tuned.size),
        "complete": tuned.complete,
        "best": tuned.best.name,
        "intact_perplexity": perplexity_of(tuned.intact.loss.mean),
        "tokens": tuned.intact.loss.tokens,
        "candidates": [
            {
                "name": one.name,
                "file_bytes": one.file_bytes,
                "loss": one.loss.mean,
                "tokens": one.loss.tokens,
                "final": one.final,
            }
            for one in tuned.judged
        ],
        "front": [one.name for one in front(finals)],
        "left_out": dict(tuned.left_out),
    }


def _show_tuned(tuned: "Tuned", several: bool) -> None:
    from ...calibrate.perplexity import perplexity_of
    from ...tune.front import front

    # Losses compare only where plans were calibrated and judged alike: the final ones.
    finals = [one for one in tuned.judged if one.final]
    shown = finals or [tuned.best]
    on_front = {one.name for one in front(finals)}
    rows = [
        (
            one.name,
            f"{perplexity_of(one.loss.mean):.3f}" + ("" if one.final else " estimated"),
            f"{one.file_bytes:,}",
            "front" if one.name in on_front else "",
        )
        for one in (tuned.intact, *shown)
    ]
    title = f"Judged on {tuned.intact.loss.tokens:,} held-out tokens"
    if several:
        title = f"{tuned.size}: j{title[1:]}"
    table(title, ("candidate", "perplexity", "bytes", ""), rows)
    early = len(tuned.judged) - len(shown)
    end = "" if tuned.complete else " Time was up before the search was complete."
    hint(
        f"{early} more were ranked by estimates, {len(tuned.left_out)} cannot have "
        f"that size.{end}"
    )

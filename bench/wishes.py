"""What each wish costs, beside the best plan that `tune` finds for it, and in how long.

    .venv/bin/python bench/wishes.py examples/demo-mixtral --seeds 0 1 2

Judged like bench/quality.py, but what is judged is the output of the cut, refitted as
its recipe says. For every size: perplexity of the wish's recipe, of the
plan that `tune --for` finds, their ratio as perplexity over dense minus one, and the
processor time of both (measuring and deciding; the cut is the same). For `default` and
`experts50` the search is among whole experts. ``--shares`` adds
the cost of each structured share at every size, and what the rule of ``auto`` expects;
``--no-tune`` leaves the searches out. ``--json`` keeps the numbers.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from quality import NO_EXPERTS, NO_ZEROS, Bench, search_text, summary

from vllm_moe_prune.calibrate.forward import StreamingModel
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.execute import execute_plan
from vllm_moe_prune.cut.planned import planned_losses
from vllm_moe_prune.cut.predict import model_facts
from vllm_moe_prune.decide.build_plan import resolved
from vllm_moe_prune.decide.cut_plan import CutPlan
from vllm_moe_prune.recipes.flags import with_overrides
from vllm_moe_prune.recipes.loading import load_recipe
from vllm_moe_prune.recipes.schema import Recipe
from vllm_moe_prune.stages.measure import measure
from vllm_moe_prune.stages.plan import plan
from vllm_moe_prune.tune.search import tune

WISHES = {
    "default": ("best-any", 0.25),
    "experts50": ("best-any", 0.5),
    "cpu40": ("best-cpu", 0.4),
    "cpu50": ("best-cpu", 0.5),
    "cpu65": ("best-cpu", 0.65),
}
"""Recipe -> what searches for the same, and the size."""
SHARES = (0.0, 0.25, 0.5, 0.75)
T = TypeVar("T")


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """A result, and the processor seconds that it took."""
    started = time.process_time()
    return work(), time.process_time() - started


def shipped(bench: Bench, name: str) -> Recipe:
    """A shipped recipe on the bench's text."""
    return bench.recipe(name, load_recipe(name).model_dump(exclude={"calibration"}))


def searched(recipe: Recipe, size: float, whole_experts: bool) -> Recipe:
    """A search for a size, among the same means as the wish has."""
    asked = with_overrides(recipe, {"total": size})
    if not whole_experts:
        return asked
    only = asked.tune.model_copy(update={"layers": (), "narrow": ()})
    return asked.model_copy(update={"tune": only})


def plans_of(
    bench: Bench, args: argparse.Namespace
) -> tuple[dict[str, CutPlan], dict[str, float], dict[str, float]]:
    """All plans by name, the seconds they took, and the shares that ``auto`` chose."""
    model, options = bench.checkpoint, bench.options
    plans = {"dense": plan(model, bench.recipe("", {**NO_EXPERTS, **NO_ZEROS}), None)}
    seconds, chosen = {}, {}
    facts = model_facts(model)
    for name, (search, size) in WISHES.items():
        recipe = shipped(bench, name)
        stats, took = timed(
            lambda asked=recipe: measure(model, asked, bench.tokens, options)
        )
        plans[name], more = timed(
            lambda asked=recipe, known=stats: plan(model, asked, known)
        )
        seconds[name] = took + more
        if recipe.structured_share == "auto":
            chosen[name] = (resolved(recipe, facts, stats).experts.drop or 0) / size
            for share in SHARES if args.shares else ():
                fixed = recipe.model_copy(update={"structured_share": share})
                plans[f"{name}, share {share:g}"] = plan(model, fixed, stats)
        if not args.no_tune:
            asked = searched(shipped(bench, search), size, search == "best-any")
            best, seconds[f"{name}, tune"] = timed(
                lambda asked=asked: tune(model, asked, options).best
            )
            plans[f"{name}, tune"] = best.plan
    return plans, seconds, chosen


def cut_perplexity(bench: Bench, plan_: CutPlan) -> float:
    """Of what the plan's cut writes: refits show only there."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        execute_plan(bench.checkpoint, plan_, out, tokens=bench.tokens)
        output = open_checkpoint(out)
        as_is = plan(output, bench.recipe("", {**NO_EXPERTS, **NO_ZEROS}), None)
        model = StreamingModel(output)
        return summary(planned_losses(model, [as_is], bench.texts)[0])["all"]


def run(folder: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One model with one calibration seed."""
    bench = Bench(folder, seed, args)
    plans, seconds, chosen = plans_of(bench, args)
    found = {name: cut_perplexity(bench, one) for name, one in plans.items()}
    return {"perplexity": found, "seconds": seconds, "chosen": chosen}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=6, help="of each domain")
    parser.add_argument("--shares", action="store_true")
    parser.add_argument("--no-tune", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.work = None
    with tempfile.TemporaryDirectory() as folder:
        args.search = Path(folder) / "search.txt"
        args.search.write_text(search_text(open_checkpoint(args.model)), "utf-8")
        runs = [run(args.model, seed, args) for seed in args.seeds]
    mean = {
        name: statistics.fmean(one["perplexity"][name] for one in runs)
        for name in runs[0]["perplexity"]
    }
    dense = mean["dense"]
    print("| plan | perplexity | over dense | seconds | share |")
    print("|---|---:|---:|---:|---:|")
    for name, value in mean.items():
        took = [one["seconds"].get(name, math.nan) for one in runs]
        share = [one["chosen"].get(name, math.nan) for one in runs]
        print(
            f"| {name} | {value:.2f} | {value / dense - 1:.4f} "
            f"| {statistics.fmean(took):.1f} | {statistics.fmean(share):.3f} |"
        )
    if args.json:
        settings = {"model": args.model, "seeds": args.seeds, "samples": args.samples}
        text = json.dumps({"settings": settings, "runs": runs}, indent=1)
        args.json.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()

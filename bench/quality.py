"""What every method costs in quality: perplexity per domain on a demo model.

    .venv/bin/python bench/quality.py examples/demo-mixtral --seeds 0 1 2

Every plan is judged in the streaming forward on the beginnings of the held-out files,
nothing is written (but for the order control, which takes two cuts). What is measured
to decide, sensitivity and the search of `tune`, is measured on the ends of those files.
``--json`` keeps the numbers, ``--markdown`` a table for docs/results/index.md. A
killed run continues with ``--work``.
"""

import argparse
import json
import math
import re
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from vllm_moe_prune import pipeline
from vllm_moe_prune.calibrate.data import TokenReader, load_heldout, load_tokens
from vllm_moe_prune.calibrate.forward import NO_TARGET, StreamingModel
from vllm_moe_prune.calibrate.stats import Stats
from vllm_moe_prune.checkpoint.open import Checkpoint
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.losses import Loss, LossJournal, Text
from vllm_moe_prune.cut.planned import planned_losses
from vllm_moe_prune.decide.cut_plan import CutPlan
from vllm_moe_prune.decide.required_stats import needed_statistics
from vllm_moe_prune.decide.sensitivity import rule
from vllm_moe_prune.errors import RecipeError
from vllm_moe_prune.recipes.loading import load_recipe
from vllm_moe_prune.recipes.schema import Recipe, parse_recipe
from vllm_moe_prune.stages.measure import collect
from vllm_moe_prune.stages.plan import plan
from vllm_moe_prune.stages.probe import with_owl, with_sensitivity
from vllm_moe_prune.tune.search import tune

EXAMPLES = Path(__file__).parent.parent / "examples"
DOMAINS = ("arithmetic", "chat", "licence", "prose", "python")
CRITERIA = ("random", "frequency", "reap", "routing-score", "total-output")
# Sensitivity takes experts one at a time, so groups of a router cannot stay equal.
BUDGETS: dict[str, dict[str, Any]] = {
    "per-layer": {},
    "global": {},
    "sensitivity": {"groups": "uneven"},
}
SUMS = 200
TOTALS = (0.4, 0.5, 0.65)
NO_EXPERTS: dict[str, Any] = {"experts": {"method": "none"}}
NO_ZEROS: dict[str, Any] = {"slim": {"method": "none"}}
Row = tuple[str, str, dict[str, Any]]
"""Group, name, recipe."""
Found = tuple[str, str, dict[str, float], float, int]
"""Group, name, what it costs, sparsity of the experts, bytes of the files."""


def rows(layers: int, seed: int) -> Iterator[Row]:
    """Every method of the table but the controls that need a cut, and the search."""
    yield "", "dense", {**NO_EXPERTS, **NO_ZEROS}
    for drop in (0.25, 0.5):
        group = f"{drop:.0%} of the experts"
        for budget, how in BUDGETS.items():
            common = {"drop": drop, "budget": budget, **how}
            for criterion in CRITERIA:
                name = "Expert Drop" if criterion == "routing-score" else criterion
                stage = {"method": "score", "criterion": criterion, **common}
                if criterion == "random":
                    stage["seed"] = seed
                yield group, f"{name}, {budget}", {"experts": stage, **NO_ZEROS}
            for name, variant in stun_variants():
                stage = {"method": "stun", **common, **variant}
                yield group, f"{name}, {budget}", {"experts": stage, **NO_ZEROS}
    for total in TOTALS:
        group = f"{total:.0%} in total"
        for method in ("magnitude", "wanda", "wanda-variant", "sparsegpt"):
            slim = {"slim": {"method": method}}
            yield group, method, {**NO_EXPERTS, **slim, "total_sparsity": total}
        owl = {"slim": {"method": "wanda", "allocation": "owl"}}
        yield group, "wanda, OWL", {**NO_EXPERTS, **owl, "total_sparsity": total}
        drop = 0.25 if total > 0.5 else 0.2
        for name, how in stun_variants():
            stage = {"method": "stun", "drop": drop, **how}
            both = {"experts": stage, "total_sparsity": total}
            yield group, f"{name} {drop:.0%}, wanda", both
            if name == "STUN":
                yield group, f"{name} {drop:.0%}, wanda, OWL", {**both, **owl}
                sgpt = {"slim": {"method": "sparsegpt"}}
                yield group, f"{name} {drop:.0%}, sparsegpt", {**both, **sgpt}
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        zeros = {} if share < 1 else NO_ZEROS
        for name in ("STUN", "total-output"):
            stage = {"method": "stun"} if name == "STUN" else scored("total-output")
            data = {"experts": stage, "total_sparsity": 0.5, "structured_share": share}
            yield (
                "structured share at 50 %",
                f"{name}, x = {share:g}",
                {**data, **zeros},
            )
    for count in range(1, layers):
        for key, what in (("moe_count", "Layer Drop"), ("block_count", "Block Drop")):
            data = {**NO_EXPERTS, **NO_ZEROS, "layers": {key: count}}
            yield "layers and blocks", f"{what} {count} of {layers}", data


def scored(criterion: str) -> dict[str, Any]:
    return {"method": "score", "criterion": criterion}


def stun_variants() -> list[tuple[str, dict[str, Any]]]:
    """STUN by both similarities, and by each alone."""
    return [
        ("STUN", {}),
        ("STUN (router rows)", {"coactivation_weight": 0.0}),
        ("STUN (co-activation)", {"router_weight": 0.0}),
        ("STUN (REAP stays)", {"representative": "reap"}),
    ]


def texts(checkpoint: Checkpoint, windows: int, length: int) -> list[Text]:
    """The held-out domains, and sums whose answers are to be written."""
    found = []
    for domain in DOMAINS:
        reader = TokenReader(checkpoint, str(EXAMPLES / "heldout" / f"{domain}.txt"))
        payload = reader.payload(length)
        ids = reader.read(windows * payload)
        found.append(Text(reader.with_bos(ids.reshape(-1, payload))))
    return [*found, sums(checkpoint)]


def search_text(checkpoint: Checkpoint, each: int = 5000) -> str:
    """What budgets and ``tune`` are judged on: as many last tokens of each domain."""
    found = []
    for domain in DOMAINS:
        path = EXAMPLES / "heldout" / f"{domain}.txt"
        text = path.read_text("utf-8")
        tokenizer = TokenReader(checkpoint, str(path)).tokenizer
        spans = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        start, _ = spans[-each]
        assert start >= len(text) // 2  # the first half judges
        found.append(text[start:])
    return "\n".join(found)


def sums(checkpoint: Checkpoint, count: int = SUMS) -> Text:
    """Questions for sums, and answers with their working; only these are targets."""
    sys.path.append(str(EXAMPLES))
    import corpus

    path = EXAMPLES / "heldout" / "arithmetic.txt"
    text = path.read_text("utf-8")
    pairs = re.findall(r"^(\d+) \+ (\d+) = \d+$", text[: len(text) // 2], re.M)
    tokenizer = TokenReader(checkpoint, str(path)).tokenizer
    rows = []
    for a, b in list(dict.fromkeys(pairs))[:count]:
        asked = {"role": "user", "content": f"What is {a} + {b}?"}
        prompt = corpus.rendered([asked]) + "<|assistant|>"
        answer = corpus.worked_sum(int(a), int(b)) + corpus.EOS
        start = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        whole = tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]
        assert whole[: len(start)] == start
        rows.append((whole, len(start)))
    length = max(len(ids) for ids, _ in rows)
    ids_ST = torch.zeros(len(rows), length, dtype=torch.int64)
    targets_ST = torch.full_like(ids_ST, NO_TARGET)
    for at, (ids, start) in enumerate(rows):
        ids_ST[at, : len(ids)] = torch.tensor(ids)
        targets_ST[at, start : len(ids)] = torch.tensor(ids[start:])
    assert len(rows) == count
    return Text(ids_ST, targets_ST)


def summary(losses: Sequence[Loss]) -> dict[str, float]:
    """Perplexity of each domain and of all, and the share of sums that are right."""
    pairs = zip(DOMAINS, losses, strict=False)
    found = {name: math.exp(min(loss.mean, 700.0)) for name, loss in pairs}
    text = losses[: len(DOMAINS)]
    mean = sum(loss.nll for loss in text) / sum(loss.tokens for loss in text)
    exact = losses[len(DOMAINS)]
    return {**found, "all": math.exp(min(mean, 700.0)), "sums": exact.exact / SUMS}


class Bench:
    """One model with one calibration seed."""

    def __init__(self, folder: str, seed: int, args: argparse.Namespace) -> None:
        self.checkpoint = open_checkpoint(folder)
        self.calibration = {
            "source": str(EXAMPLES / "calibration.txt"),
            "samples": args.samples,
            "sequence_length": args.length,
            "seed": seed,
            "heldout": args.samples,
            "heldout_source": str(args.search),
        }
        self.texts = texts(self.checkpoint, args.windows, args.length)
        self.model = StreamingModel(self.checkpoint)
        work = args.work / f"{Path(folder).name}-{seed}" if args.work else None
        self.work, self.seed = work, seed
        self.journal = LossJournal(work / "bench.jsonl" if work else None)
        self.tokens = load_tokens(self.checkpoint, self.recipe("", {}).calibration)
        self.options = pipeline.RunOptions()

    def recipe(self, name: str, data: dict[str, Any]) -> Recipe:
        return parse_recipe({"calibration": self.calibration, **data}, name)

    def run(self) -> list[Found]:
        """Every row of the table; those of a finished seed are kept with its work."""
        kept = self.work / "rows.json" if self.work else None
        if kept is not None and kept.is_file():
            return [tuple(row) for row in json.loads(kept.read_text("utf-8"))]
        found = self.rows()
        if kept is not None:
            kept.write_text(json.dumps(found), "utf-8")
        return found

    def rows(self) -> list[Found]:
        found: list[Found] = []
        asked = [
            (group, name, self.recipe(name, data))
            for group, name, data in rows(len(self.checkpoint.layers), self.seed)
        ]
        recipes = [recipe for _, _, recipe in asked]
        stats = collect(self.checkpoint, recipes, self.tokens, self.options)
        curves = self.sensitivities(recipes, stats)
        plans = []
        for group, name, recipe in asked:
            known = curves.get(rule(recipe), stats)
            if "owl_outliers_E" in needed_statistics(recipe):
                known = with_owl(self.model, recipe, known, self.tokens)
            try:
                plans.append((group, name, plan(self.checkpoint, recipe, known)))
            except RecipeError as error:
                print(f"{name}: left out: {error}", file=sys.stderr)
        plans += self.tuned()
        decided = [one for _, _, one in plans]
        ids_ST = self.tokens.ids_ST
        losses = planned_losses(
            self.model, decided, self.texts, ids_ST, journal=self.journal
        )
        for (group, name, one), loss in zip(plans, losses, strict=True):
            found.append((group, name, summary(loss), *size_of(one)))
        return [*found, *self.order_control()]

    def sensitivities(
        self, recipes: Sequence[Recipe], stats: Stats
    ) -> dict[str, Stats]:
        found: dict[str, Stats] = {}
        for recipe in recipes:
            needs = "sensitivity_P2" in needed_statistics(recipe)
            if needs and rule(recipe) not in found:
                heldout = load_heldout(self.checkpoint, recipe.calibration)
                found[rule(recipe)] = with_sensitivity(
                    self.model, recipe, stats, heldout, self.journal
                )
        return found

    def tuned(self) -> list[tuple[str, str, CutPlan]]:
        best = load_recipe("best").model_dump(exclude={"calibration"})
        found = []
        for total in TOTALS:
            recipe = self.recipe("tune", {**best, "total_sparsity": total})
            winner = tune(self.checkpoint, recipe, self.options, work=self.work).best
            found.append((f"{total:.0%} in total", "tune", winner.plan))
            print(f"tune {total:.0%}: {winner.name}", file=sys.stderr)
        return found

    def order_control(self) -> list[Found]:
        data = {
            "experts": {"method": "stun", "drop": 0.2},
            "total_sparsity": 0.5,
            "order": "unstructured-first",
        }
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            recipe = self.recipe("zeros first", data)
            decided, _, _ = pipeline.run(self.checkpoint, recipe, out, self.options)
            losses = losses_as_is(open_checkpoint(out), self.texts)
        assert decided.predicted is not None
        name = "zeros first: wanda, then STUN 20%"
        size = decided.predicted.file_bytes
        return [("50% in total", name, summary(losses), 0.5, size)]


def losses_as_is(checkpoint: Checkpoint, asked: Sequence[Text]) -> tuple[Loss, ...]:
    """What a checkpoint loses on each text as it lies on the disk."""
    whole = parse_recipe({**NO_EXPERTS, **NO_ZEROS}, "whole")
    plans = [plan(checkpoint, whole, None)]
    return planned_losses(StreamingModel(checkpoint), plans, asked, None)[0]


def size_of(decided: CutPlan) -> tuple[float, int]:
    assert decided.predicted is not None
    return decided.predicted.expert_sparsity, decided.predicted.file_bytes


def markdown(table: Sequence[dict[str, Any]], seeds: int) -> str:
    """The table, one part for each group; mean ± spread over seeds, if several."""
    lines: list[str] = []
    group = None
    heads = ("method", "sparsity", *DOMAINS, "all", "sums right")
    for row in table:
        if row["group"] != group:
            group = row["group"]
            title = [f"\n**{group}**\n"] if group else []
            lines += [*title, "| " + " | ".join(heads) + " |"]
            lines.append("|---|" + "---:|" * (len(heads) - 1))
        cells = [row["name"], f"{row['sparsity']:.1%}"]
        cells += [f"{row['mean'][name]:.2f}" for name in DOMAINS]
        spread = f" ± {row['spread']['all']:.2f}" if seeds > 1 else ""
        cells.append(f"{row['mean']['all']:.2f}{spread}")
        cells.append(f"{row['mean']['sums']:.1%}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=8, help="of each domain")
    parser.add_argument("--work", type=Path, help="keeps losses, to continue with")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        args.search = Path(folder) / "search.txt"
        args.search.write_text(search_text(open_checkpoint(args.model)), "utf-8")
        runs = [Bench(args.model, seed, args).run() for seed in args.seeds]
    table = []
    for at, (group, name, _, sparsity, size) in enumerate(runs[0]):
        values = [run[at][2] for run in runs]
        mean = {key: statistics.fmean(v[key] for v in values) for key in values[0]}
        spread = {key: statistics.pstdev(v[key] for v in values) for key in values[0]}
        row = {"group": group, "name": name, "sparsity": sparsity, "bytes": size}
        table.append({**row, "mean": mean, "spread": spread})
    order = list(dict.fromkeys(row["group"] for row in table))
    table.sort(key=lambda row: order.index(row["group"]))
    print(markdown(table, len(args.seeds)))
    if args.json:
        kept = ("model", "seeds", "samples", "length", "windows")
        settings = {key: getattr(args, key) for key in kept}
        text = json.dumps({"settings": settings, "rows": table}, indent=1)
        args.json.write_text(text + "\n", "utf-8")
    if args.markdown:
        args.markdown.write_text(markdown(table, len(args.seeds)), "utf-8")


if __name__ == "__main__":
    main()

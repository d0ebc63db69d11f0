"""What the commands that judge models print: quality, comparisons, speed."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from .draw import err, hint, print_json, table

if TYPE_CHECKING:
    from ...calibrate.perplexity import Perplexity
    from ...judge.divergence import Agreement
    from ...judge.gate import Failure
    from ...judge.generation import Generated, Habits
    from ...judge.quality import Quality
    from ...judge.recovery import Recovery, Score


def show_quality(
    quality: "Quality",
    original: "Quality | None",
    failed: Sequence["Failure"],
    as_json: bool,
) -> None:
    """What ``eval`` measured, beside the original if there is one."""
    from ...judge.quality import as_data
    from ...judge.recovery import recoveries

    found = recoveries(quality.scores, original.scores) if original else []
    if as_json:
        data = as_data(quality)
        if original is not None:
            data["against"] = as_data(original)
            data["recovery"] = [asdict(one) for one in found]
        data["failed"] = [asdict(one) for one in failed]
        print_json(data)
        show_failures(failed)
        return
    if quality.texts:
        _show_texts(quality.texts, original.texts if original else None)
    if quality.scores:
        _show_tasks(quality.scores, found, original)
    if quality.generated:
        _show_answers(quality.generated, original.generated if original else None)
    show_failures(failed)


def _show_texts(
    texts: Sequence["Perplexity"], original: Sequence["Perplexity"] | None
) -> None:
    heads = ["text", "tokens", "nats per token", "perplexity"]
    rows = [
        [
            one.source,
            f"{one.tokens:,}",
            f"{one.nll_sum / one.tokens:.4f}",
            f"{one.perplexity:.3f}",
        ]
        for one in texts
    ]
    if original is not None:
        # By name: a result from a file may be of other texts.
        before = {one.source: one for one in original}
        heads += ["original", "times as high"]
        for row, one in zip(rows, texts, strict=True):
            row += _against(one, before.get(one.source))
    table("Held-out perplexity", heads, rows)


def _against(text: "Perplexity", original: "Perplexity | None") -> list[str]:
    if original is None:
        return ["-", "-"]
    times = text.perplexity / original.perplexity
    return [f"{original.perplexity:.3f}", f"{times:.3f}"]


def _show_tasks(
    scores: Sequence["Score"],
    found: Sequence["Recovery"],
    original: "Quality | None",
) -> None:
    from ...judge.recovery import with_mean

    heads = ["task", "metric", "samples", "score"]
    rows = [
        [one.task, one.metric, f"{one.samples:,}", score_text(one)]
        for one in with_mean(scores)
    ]
    if original is not None:
        recovered = {one.task: one for one in found}
        before = {one.task: one for one in with_mean(original.scores)}
        heads += ["original", "recovered"]
        for row in rows:
            name = row[0]
            both = name in recovered
            row += [
                score_text(before[name]) if both and name in before else "-",
                recovery_text(recovered[name]) if both else "-",
            ]
    table("Tasks, in %", heads, rows, text=["metric"])
    hint("± is one standard error, of samples drawn anew.")


def _show_answers(found: "Generated", original: "Generated | None") -> None:
    from ...judge.generation import habits

    rows = []
    for kind in ("greedy", "sampled"):
        ours = habits(getattr(found, kind))
        rows.append([kind, *(text(ours) for _, text in HABITS)])
        if original is not None:
            theirs = habits(getattr(original, kind))
            rows.append(["  original", *(text(theirs) for _, text in HABITS)])
    count = len(found.greedy)
    title = f"Answers to {count} prompts of {found.prompts.source}"
    table(title, ["", *(name for name, _ in HABITS)], rows)
    if found.against is not None:
        rows = [[name, text(found.against)] for name, text in AGREEMENT]
        table("Along the original's greedy answers", ["", ""], rows)
    hint(f"At most {found.new_tokens} tokens each. Definitions: docs/methods.md.")


HABITS: list[tuple[str, Callable[["Habits"], str]]] = [
    ("tokens", lambda one: f"{one.length:.1f}"),
    ("end by themselves", lambda one: f"{one.ended:.1%}"),
    ("repetition", lambda one: f"{one.repetition:.1%}"),
    ("loops", lambda one: f"{one.loops:.1%}"),
]
AGREEMENT: list[tuple[str, Callable[["Agreement"], str]]] = [
    ("tokens chosen alike", lambda one: f"{one.agreement:.1%}"),
    ("same beginning", lambda one: f"{one.prefix:.1%}"),
    ("KL per token, at least", lambda one: f"{one.kl:.4f}"),
]


def show_failures(failed: Sequence["Failure"]) -> None:
    """One line on stderr for each condition that made the command fail."""
    for one in failed:
        err.print(
            f"failed: {one.condition}: {one.value:.4g} ({one.where}, {one.model})"
        )


def score_text(score: "Score") -> str:
    """In per cent, with its standard error."""
    return _with_error(100 * score.value, score.stderr, 100)


def recovery_text(one: "Recovery") -> str:
    """In per cent of the original, with its standard error."""
    if one.percent is None:
        return "original: 0"
    return _with_error(one.percent, one.stderr, 1) + " %"


def _with_error(value: float, stderr: float | None, unit: float) -> str:
    if stderr is None or not math.isfinite(stderr):
        return f"{value:.1f}"
    return f"{value:.1f} ± {unit * stderr:.1f}"

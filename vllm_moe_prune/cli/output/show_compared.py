"""What ``compare`` and ``speed`` print."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ...progress import gib
from .draw import hint, print_json, table
from .show_judged import (
    AGREEMENT,
    HABITS,
    recovery_text,
    score_text,
    show_failures,
)

if TYPE_CHECKING:
    from ...judge.compare import Column, Size
    from ...judge.gate import Failure
    from ...judge.speed import Speed, Spread
    from ...judge.trim_slim_speed import Rows


def show_compared(
    columns: Sequence["Column"], failed: Sequence["Failure"], as_json: bool
) -> None:
    """Checkpoints side by side; the first is what the others are measured against."""
    if as_json:
        found = [_column_data(one, columns[0]) for one in columns]
        print_json({"checkpoints": found, "failed": [asdict(one) for one in failed]})
        show_failures(failed)
        return
    rows = [
        *_sizes(columns),
        *_texts(columns),
        *_tasks(columns),
        *_answers(columns),
        *_speeds(columns),
    ]
    names = [column.quality.model for column in columns]
    # Folders of one name are told apart by their paths.
    unique = len(set(names)) == len(names)
    heads = names if unique else [column.source for column in columns]
    table("Comparison", ["", *heads], rows)
    hint("Brackets, recovery: % of the first. FLOPs: mean over 2,048 tokens.")
    if any(column.quality.scores for column in columns):
        hint("± is one standard error, of samples drawn anew.")
    if any(column.speed for column in columns):
        hint("Speeds: median of repeats (lowest–highest), one request at a time.")
    show_failures(failed)


def _column_data(column: "Column", first: "Column") -> dict[str, Any]:
    from ...judge.quality import as_data
    from ...judge.recovery import recoveries

    found = recoveries(column.quality.scores, first.quality.scores)
    return {
        "source": column.source,
        **asdict(column.size),
        "flops_per_token": column.size.flops_per_token,
        **as_data(column.quality),
        "recovery": [asdict(one) for one in found],
        "speed": asdict(column.speed) if column.speed else None,
    }


def _sizes(columns: Sequence["Column"]) -> Iterator[list[str]]:
    what: list[tuple[str, Callable[[Size], float | None], Callable[[float], str]]] = [
        ("weights", lambda size: size.weight_bytes, gib),
        ("files", lambda size: size.file_bytes, gib),
        ("parameters", lambda size: size.parameters, "{:,}".format),
        ("FLOPs per token", lambda size: size.flops_per_token, flops_text),
    ]
    for name, number, text in what:
        found = [number(column.size) for column in columns]
        yield [name, *_beside_first(found, text)]


def flops_text(flops: float) -> str:
    """With a prefix that suits them."""
    unit, sign = (1e12, "T") if flops >= 1e11 else (1e9, "G")
    if flops < 1e8:
        unit, sign = 1e6, "M"
    return f"{flops / unit:.3g} {sign}"


def _beside_first(
    found: Sequence[float | None], text: Callable[[float], str]
) -> list[str]:
    """Each number, and what part of the first it is."""
    first = found[0]
    cells = ["-" if one is None else text(one) for one in found]
    for at, one in enumerate(found[1:], 1):
        if one is not None and first:
            cells[at] += f" ({one / first:.1%})"
    return cells


def _texts(columns: Sequence["Column"]) -> Iterator[list[str]]:
    for at, text in enumerate(columns[0].quality.texts):
        # Every column was judged on the same texts in the same order.
        found = [column.quality.texts[at].perplexity for column in columns]
        name = f"perplexity: {text.source}"
        yield [name, *_beside_first(found, "{:.3f}".format)]


def _tasks(columns: Sequence["Column"]) -> Iterator[list[str]]:
    from ...judge.recovery import recoveries, with_mean

    if not columns[0].quality.scores:
        return
    first = columns[0].quality.scores
    scores = [with_mean(column.quality.scores) for column in columns]
    found = [recoveries(column.quality.scores, first) for column in columns]
    for at, task in enumerate(scores[0]):
        yield [f"{task.task}, %", *(score_text(one[at]) for one in scores)]
        yield ["  recovered", "", *(recovery_text(one[at]) for one in found[1:])]


def _answers(columns: Sequence["Column"]) -> Iterator[list[str]]:
    from ...judge.generation import habits

    found = [column.quality.generated for column in columns]
    for kind in ("greedy", "sampled"):
        every = [habits(getattr(one, kind)) for one in found if one is not None]
        for name, text in HABITS if every else ():
            yield [f"{kind}: {name}", *(text(one) for one in every)]
    pairs = [one.against for one in found if one is not None and one.against]
    for name, text_of in AGREEMENT if pairs else ():
        yield [name, "", *(text_of(one) for one in pairs)]


def _speeds(columns: Sequence["Column"]) -> Iterator[list[str]]:
    timed = [column.speed for column in columns]
    # A file of speeds may hold other contexts for each checkpoint.
    contexts = sorted(
        {one.context for speed in timed if speed for one in speed.contexts}
    )
    for kind in ("prefill", "decode"):
        for context in contexts:
            cells = [_at(speed, context, kind) for speed in timed]
            yield [f"{kind} tokens/s at {context:,}", *cells]
    if any(timed):
        peaks = [speed.peak_bytes if speed else None for speed in timed]
        yield ["peak memory", *_beside_first(peaks, gib)]


def _at(speed: "Speed | None", context: int, kind: str) -> str:
    for one in speed.contexts if speed else ():
        if one.context == context:
            return spread_text(getattr(one, kind))
    return "-"


def spread_text(spread: "Spread") -> str:
    """The median, and between what the repeats lie."""
    return f"{_rate(spread.median)} ({_rate(spread.low)}–{_rate(spread.high)})"


def _rate(tokens: float) -> str:
    """Three digits at least, whole from 100 on."""
    return f"{tokens:,.0f}" if tokens >= 100 else f"{tokens:.3g}"


def show_speed(found: "Rows", as_json: bool) -> None:
    """Baseline, trim-only, slim-only and both, in one runtime."""
    if as_json:
        print_json(speed_data(found))
        return
    first = found.rows[0]
    sizes = [
        [
            row.role,
            row.model,
            gib(row.size.weight_bytes),
            "-" if row.size.flops is None else flops_text(row.size.flops),
            gib(row.speed.peak_bytes),
        ]
        for row in found.rows
    ]
    columns = ("", "checkpoint", "weights", "FLOPs", "peak memory")
    table("Size", columns, sizes, text=["checkpoint"])
    rates = []
    for at, before in enumerate(first.speed.contexts):
        for row in found.rows:
            # One sweep for all rows: the same contexts in the same order.
            one = row.speed.contexts[at]
            rates.append(
                [
                    f"{one.context:,}",
                    row.role,
                    spread_text(one.prefill),
                    _times(one.prefill, before.prefill),
                    spread_text(one.decode),
                    _times(one.decode, before.decode),
                ]
            )
    heads = ("context", "", "prefill", "times", "decode", "times")
    table("Tokens per second", heads, rates, text=["", "prefill", "decode"])
    for role, why in found.missing.items():
        hint(f"No {role}: {why}.")
    hint(
        f"Median of {found.sweep.repeats} requests (lowest–highest), one at a time; "
        "FLOPs of 2,048 tokens at batch 1."
    )
    if found.load_average > (os.cpu_count() or 1) / 2:
        hint(
            f"Other processes used this machine: load average {found.load_average:.1f}."
        )


def _times(rate: "Spread", baseline: "Spread") -> str:
    return f"{rate.median / baseline.median:.2f}"


def speed_data(found: "Rows") -> dict[str, Any]:
    """As ``speed --json`` prints it, and ``compare --speed-from`` reads it."""
    return {
        "rows": [
            {
                "role": row.role,
                "model": row.model,
                **asdict(row.size),
                **asdict(row.speed),
            }
            for row in found.rows
        ],
        "missing": found.missing,
        "sweep": asdict(found.sweep),
        "load_average": found.load_average,
    }

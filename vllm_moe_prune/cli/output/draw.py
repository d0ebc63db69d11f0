"""How the command line shows things: tables, progress, one-line errors.

Results go to stdout, everything else to stderr; ``--json`` prints data instead.
"""

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from ...errors import Interrupted, OutputError, said_by
from ...progress import Progress, Report, gib, unit_of

# Paths and names are shown as they are, whatever brackets and colons they hold.
out = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    # From 59.95 on it would be shown as 60.0 s.
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def print_json(data: dict[str, Any]) -> None:
    """Machine-readable result on stdout; JSON has no infinity, so it says null."""
    # default: paths as text. Not by rich, which would wrap long lines.
    text = json.dumps(_finite(data), indent=2, default=str, allow_nan=False)
    sys.stdout.write(text + "\n")


def _finite(data: Any) -> Any:
    """The same with null for every number that is infinite or NaN."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    text: Sequence[str] = (),
) -> None:
    """A table on stdout; numbers right, first column and those of text left."""
    out.print(Text(title, "bold"))
    grid = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for position, column in enumerate(columns):
        left = position == 0 or column in text
        grid.add_column(column, justify="left" if left else "right")
    for row in rows:
        grid.add_row(*(str(cell) for cell in row))
    out.print(grid)
    out.print()


def facts(title: str, pairs: Sequence[tuple[str, object]]) -> None:
    """Names and values, aligned."""
    out.print(Text(title, "bold"))
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        out.print(Text.assemble((f"  {name.ljust(width)}  ", "dim"), str(value)))
    out.print()


def warn(text: str) -> None:
    """What the user may not expect, on stderr."""
    err.print(Text(f"note: {text}", "yellow"))


def hint(text: str) -> None:
    """What to do next."""
    out.print(Text(text, "dim"))


@contextmanager
def resumable(how: str) -> Iterator[None]:
    """Let Ctrl-C and a failing disk say how to go on."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(f"what is finished is kept. {how}") from error
    except OSError as error:
        raise OutputError(f"{said_by(error)} When that is mended: {how}") from error


@contextmanager
def watching(quiet: bool = False) -> Iterator[Report]:
    """A report that draws a bar on a terminal and plain lines elsewhere."""
    if quiet:
        yield lambda progress: None
    elif err.is_terminal:
        with _bar() as bar:
            yield _BarReport(bar)
    else:
        yield _LineReport()


def _bar() -> Bar:
    return Bar(
        TextColumn("{task.description:8}"),
        BarColumn(bar_width=None),  # what is left of the line
        TextColumn("{task.fields[detail]}"),
        console=err,
        transient=True,
        expand=True,
    )


def _detail(progress: Progress, elapsed_s: float) -> str:
    steps = progress.counted == "steps"
    rate = progress.bytes_done / elapsed_s if elapsed_s > 0 else 0.0
    speed = ""  # of the first report nothing is known
    if rate:
        left = (progress.bytes_total - progress.bytes_done) / rate
        shown = f"{rate:.2f} steps" if steps else gib(rate)
        speed = f", {shown}/s, {duration(left)} left"
    if steps:
        return f"step {progress.bytes_done} of {progress.bytes_total}{speed}"
    name, unit = unit_of(progress.bytes_total)
    done, total = progress.bytes_done / unit, progress.bytes_total / unit
    at = f"layer {progress.layer} of {progress.layers}, " if progress.layers else ""
    note = f"; {progress.note}" if progress.note else ""
    return f"{at}{done:.2f} of {total:.2f} {name}{speed}{note}"


def _is_done(progress: Progress) -> bool:
    return progress.bytes_done >= progress.bytes_total


class _BarReport:
    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        # By stage: its bar, and when it began, so that rates are of the stage alone.
        self._tasks: dict[str, tuple[TaskID, float]] = {}

    def __call__(self, progress: Progress) -> None:
        if progress.stage not in self._tasks:
            task = self._bar.add_task(progress.stage, detail="")
            self._tasks[progress.stage] = task, time.monotonic()
        task, start = self._tasks[progress.stage]
        self._bar.update(
            task,
            completed=progress.bytes_done,
            total=progress.bytes_total,
            detail=_detail(progress, time.monotonic() - start),
        )


class _LineReport:
    """At most one line every two seconds, and the last one of each stage."""

    def __init__(self) -> None:
        self._start: dict[str, float] = {}
        self._shown = 0.0

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        start = self._start.setdefault(progress.stage, now)
        # A stage's end is always shown: logs tell how long each took.
        if now - self._shown < 2.0 and not _is_done(progress):
            return
        self._shown = now
        err.print(Text(f"{progress.stage}: {_detail(progress, now - start)}", "dim"))

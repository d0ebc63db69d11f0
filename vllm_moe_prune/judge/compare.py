"""Several checkpoints side by side: quality, size, FLOPs, speed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from ..checkpoint.open import Checkpoint
from ..errors import EvaluationError, PlanError
from ..recipes.numbers import Count
from ..tune.recommend import CONTEXT, costs_as_is
from .quality import Quality, Subject
from .saved_results import Printed, read_printed
from .speed import AtContext, Speed, Spread


@dataclass(frozen=True)
class Size:
    """What a checkpoint takes, from its headers."""

    file_bytes: int
    """Of its safetensors files."""
    weight_bytes: int
    """Of the tensors in them, as they are stored."""
    parameters: int
    flops: int | None
    """Of one forward over 2,048 tokens at batch 1; None where routing is redirect: how
    often slots meet in one expert is not in headers."""

    @property
    def flops_per_token(self) -> float | None:
        """The mean over those 2,048 tokens."""
        return None if self.flops is None else self.flops / CONTEXT


@dataclass(frozen=True)
class Column:
    """Everything known of one checkpoint."""

    source: str
    """As it was named."""
    size: Size
    quality: Quality
    speed: Speed | None


def size_of(checkpoint: Checkpoint) -> Size:
    """Sizes and FLOPs of a checkpoint as it is."""
    # Parts are what quantized matrices are stored as.
    held = [*checkpoint.tensors.values(), *checkpoint.parts.values()]
    try:
        flops = costs_as_is(checkpoint).flops
    except PlanError:  # redirect routing
        flops = None
    return Size(
        # Each file once, however many tensors it holds.
        sum(file.stat().st_size for file in {info.file for info in held}),
        checkpoint.stored_bytes,
        checkpoint.parameters,
        flops,
    )


Rate = Annotated[float, Field(gt=0, le=1e12)]
"""Tokens per second."""


class _Spread(Printed):
    median: Rate
    low: Rate
    high: Rate

    @model_validator(mode="after")
    def _ordered(self) -> "_Spread":
        if not self.low <= self.median <= self.high:
            raise ValueError("low, median and high are not in order")
        return self

    def plain(self) -> Spread:
        return Spread(self.median, self.low, self.high)


class _AtContext(Printed):
    context: Annotated[int, Field(ge=1, lt=1 << 31)]
    prefill: _Spread
    decode: _Spread


class _Row(Printed):
    model: str
    contexts: Annotated[tuple[_AtContext, ...], Field(fail_fast=True)]
    peak_bytes: Count


class _Speeds(Printed):
    rows: Annotated[tuple[_Row, ...], Field(fail_fast=True)]


def find_speeds(path: Path, subjects: Sequence[Subject]) -> dict[str, Speed]:
    """The speeds of some checkpoints in such a file.

    Raises:
        EvaluationError: It has none of them, or two of them have one name.
    """
    names = [one.name for one in subjects]
    if len(set(names)) < len(names):
        raise EvaluationError(
            f"{path}: tells checkpoints by the names of their folders, of which "
            f"{', '.join(names)} are not all different. Rename one, or use --speed."
        )
    found = load_speeds(path)
    if missing := [name for name in names if name not in found]:
        raise EvaluationError(
            f"{path}: holds no speed of {', '.join(missing)}, only of "
            f"{', '.join(found) or 'none'}."
        )
    return found


def load_speeds(path: Path) -> dict[str, Speed]:
    """The speed of each model in what ``speed --json`` printed.

    Raises:
        EvaluationError: It is no such file.
    """
    found = read_printed(path, _Speeds, "speed")
    return {
        row.model: Speed(
            tuple(
                AtContext(one.context, one.prefill.plain(), one.decode.plain())
                for one in row.contexts
            ),
            row.peak_bytes,
        )
        for row in found.rows
    }

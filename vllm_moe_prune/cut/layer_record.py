"""What a cut did to one layer: a line of its journal, and part of the provenance."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError

from ..checkpoint.writer import JOURNAL_NAME
from ..errors import OutputError
from ..recipes.numbers import MOST, Count
from ..recipes.schema import first_problem

Channels = Annotated[str, Field(pattern=r"^[0-9a-f]*$", max_length=MOST // 4)]
Powers = Annotated[list[FiniteFloat], Field(min_length=5, max_length=5)]
Error = Annotated[FiniteFloat, Field(ge=0.0)]


@dataclass(kw_only=True)
class SourceErrors:
    """What the experts lack of their target on one source's windows kept apart.

    Of each window squared, as a part of the target's own square; the geometric mean.
    """

    source: str
    before: Error
    after: Error


@dataclass(kw_only=True)
class RefitRecord:
    """What refitting did to one layer."""

    ridge: Annotated[FiniteFloat, Field(gt=0.0)] | None
    """None: left as it was, since a source would have got worse."""
    sources: list[SourceErrors] = field(default_factory=list)


@dataclass(kw_only=True)
class ExpertRecord:
    """What was done to one expert, as ranks tell each other."""

    expert: int
    """Its id in the input."""
    new: int
    """Its number in the output."""
    seen: bool
    """Whether calibration tokens reached it, or none were used."""
    parameters: int
    zeros: int
    trimmed_powers_M5: list[list[float]]
    """Of each of its matrices; see ``LayerRecord``."""
    slimmed_powers_M5: list[list[float]]
    channels: str | None


@dataclass(kw_only=True)
class LayerRecord:
    """What slimming did to one layer; one journal line."""

    layer: Count
    expert_parameters: Count = 0
    zeros: Count = 0
    """Zeros among the layer's surviving expert weights, those there before included."""
    dense_zeros: Count = 0
    """Zeros among its other matrices that were slimmed: attention, MLPs."""
    channels: list[Channels] = field(default_factory=list)
    """Of a narrowed layer: which channels each survivor keeps, as hexadecimal digits of
    bytes: channel c is bit c % 8 of byte c // 8."""
    unseen: list[Count] = field(default_factory=list)
    """Input ids of experts no calibration token reached: pruned by magnitude, or
    rounded to nearest."""
    trimmed_powers_5: Powers = field(default_factory=lambda: [0.0] * 5)
    """Sums of powers (``slim/kurtosis.py``) of the surviving experts' weights, before
    slimming."""
    slimmed_powers_5: Powers = field(default_factory=lambda: [0.0] * 5)
    """The same of what was written."""
    refit: RefitRecord | None = None
    """None: the layer is not one to refit."""

    def add(self, one: ExpertRecord) -> None:
        """Count an expert; all in the order of the output, by which sums go."""
        if not one.seen:
            self.unseen.append(one.expert)
        self.expert_parameters += one.parameters
        self.zeros += one.zeros
        _add(self.trimmed_powers_5, one.trimmed_powers_M5)
        _add(self.slimmed_powers_5, one.slimmed_powers_M5)
        if one.channels is not None:
            self.channels.append(one.channels)


def _add(powers_5: list[float], powers_M5: list[list[float]]) -> None:
    for matrix_5 in powers_M5:
        for power, total in enumerate(matrix_5):
            powers_5[power] += total


RECORD = TypeAdapter(LayerRecord)


def journalled(journal: Sequence[dict[str, object]]) -> dict[int, LayerRecord]:
    """Records of layers an interrupted run has slimmed."""
    records = {}
    for entry in journal:
        if isinstance(fields := entry.get("layer"), dict):
            try:
                record = RECORD.validate_python(fields)
            except ValidationError as error:
                raise OutputError(
                    f"{JOURNAL_NAME}: a line does not describe a layer: "
                    f"{first_problem(error)}. Pass --overwrite to start again."
                ) from error
            records[record.layer] = record
    return records

"""What a report reads of provenance.json."""

from pathlib import Path
from typing import Annotated

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    model_validator,
)

from ..cut.finish import PROVENANCE
from ..errors import CheckpointError
from ..files.json_file import read_json
from ..recipes.numbers import Count, Fraction, Index, Indices
from ..recipes.schema import first_problem

# Bounded as weight_powers_E5 is in the statistics.
Sum = Annotated[float, Field(ge=-1e160, le=1e160)]
Positive = Annotated[float, Field(ge=0.0, le=1e160)]
Powers = tuple[Positive, Sum, Positive, Sum, Positive]
"""Sums of w^0 to w^4; even powers are not negative."""


class Record(BaseModel):
    """Part of provenance.json; keys that a report does not need are passed over."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class LayerCounts(Record):
    layer: Index
    experts_before: Index
    experts_after: Index
    sparsity: Fraction
    unseen_experts: Indices = ()


class Counts(Record):
    of_experts: Fraction
    of_all_parameters: Fraction
    parameters_before: Count
    parameters_after: Count
    zeros: Count
    layers: Annotated[tuple[LayerCounts, ...], Field(fail_fast=True)]

    @model_validator(mode="after")
    def _fewer(self) -> "Counts":
        if not self.zeros <= self.parameters_after <= self.parameters_before:
            raise ValueError("more zeros than parameters, or more after than before")
        return self


class LayerPowers(Record):
    layer: Index
    trimmed: Powers
    slimmed: Powers


class RefitSource(Record):
    """What experts lack of their target on one source: squares, of the target's own."""

    source: str
    before: Positive
    after: Positive


class LayerRefit(Record):
    """What refitting did to a layer."""

    layer: Index
    ridge: Positive | None
    """None: left as it was, since a source would have got worse."""
    sources: Annotated[tuple[RefitSource, ...], Field(fail_fast=True)] = ()


class Provenance(Record):
    tool_version: str
    calibration: dict[str, JsonValue] | None = None
    forward_passes: dict[str, Count]
    sparsity_achieved: Counts
    source_bytes: Count | None = None
    weight_powers: Annotated[tuple[LayerPowers, ...], Field(fail_fast=True)] = ()
    refit: Annotated[tuple[LayerRefit, ...], Field(fail_fast=True)] = ()
    earlier: dict[str, JsonValue] | None = None


def read_provenance(path: Path) -> Provenance:
    """Read and check it.

    Raises:
        CheckpointError: It is missing or damaged.
    """
    try:
        return Provenance.model_validate(read_json(path, PROVENANCE))
    except ValidationError as error:
        raise CheckpointError(
            f"{path}: {first_problem(error)} Copy the folder again, or repeat the cut."
        ) from error

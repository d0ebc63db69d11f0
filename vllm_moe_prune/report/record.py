"""What a report reads of provenance.json."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from ..cut.finish import PROVENANCE
from ..errors import CheckpointError
from ..files.json_file import read_json
from ..recipes.schema import first_problem

Count = Annotated[int, Field(ge=0)]
Powers = Annotated[tuple[float, ...], Field(min_length=5, max_length=5)]


class Record(BaseModel):
    """Part of provenance.json; keys that a report does not need are passed over."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class LayerCounts(Record):
    layer: Count
    experts_before: Annotated[int, Field(ge=0, le=1 << 16)]
    experts_after: Count
    sparsity: Annotated[float, Field(ge=0.0, le=1.0)]
    unseen_experts: tuple[Count, ...] = ()


class Counts(Record):
    of_experts: float
    of_all_parameters: float
    parameters_before: Count
    parameters_after: Count
    zeros: Count
    layers: tuple[LayerCounts, ...]


class LayerPowers(Record):
    layer: Count
    trimmed: Powers
    slimmed: Powers


class Provenance(Record):
    tool_version: str
    calibration: dict[str, JsonValue] | None = None
    forward_passes: dict[str, Count]
    sparsity_achieved: Counts
    source_bytes: Count | None = None
    weight_powers: tuple[LayerPowers, ...] = ()
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

"""Results of earlier commands, read back from what their ``--json`` printed."""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from ..checkpoint.index import read_json
from ..errors import CheckpointError, EvaluationError
from ..recipes.schema import first_problem


class Printed(BaseModel):
    """Part of such a result; what else it holds is not looked at."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


Kind = TypeVar("Kind", bound=Printed)


def read_printed(path: Path, kind: type[Kind], command: str) -> Kind:
    """Read and check it.

    Args:
        path: The file.
        kind: What it should hold.
        command: Which prints it, e.g. ``eval``.

    Raises:
        EvaluationError: It is no such file.
    """
    try:
        return kind.model_validate(read_json(path))
    except CheckpointError as error:
        raise EvaluationError(str(error)) from error
    except ValidationError as error:
        raise EvaluationError(
            f"{path}: {first_problem(error)}. Give what `vllm-moe-prune {command} "
            "--json` printed."
        ) from error

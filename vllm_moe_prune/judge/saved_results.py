"""Results of earlier commands, read back from what their ``--json`` printed."""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from ..errors import EvaluationError
from ..files.json_file import read_json
from ..files.regular import MIB, Kind
from ..recipes.schema import first_problem

# `vllm bench serve --save-detailed` lists one number per generated token.
RESULT = Kind(name="result of a command", max_bytes=64 * MIB, error=EvaluationError)


class Printed(BaseModel):
    """Part of such a result; what else it holds is not looked at."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


Found = TypeVar("Found", bound=Printed)


def read_printed(path: Path, kind: type[Found], command: str) -> Found:
    """Read and check it.

    Args:
        path: The file.
        kind: What it should hold.
        command: Which prints it, e.g. ``eval``.

    Raises:
        EvaluationError: It is no such file.
    """
    try:
        return kind.model_validate(read_json(path, RESULT))
    except ValidationError as error:
        raise EvaluationError(
            f"{path}: {first_problem(error)}. Give what `vllm-moe-prune {command} "
            "--json` printed."
        ) from error

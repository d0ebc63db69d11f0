"""The base of every pydantic model that is read from a file."""

import reprlib
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Share = Annotated[float, Field(ge=0.0, lt=1.0)]


class Strict(BaseModel):
    """Base of every model read from a file: unknown keys are errors, values frozen."""

    # Docstrings of fields become the descriptions of the JSON Schema.
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def refuse(*problems: str | Literal[False]) -> None:
    """Raise the first problem, each given as ``condition and message``."""
    if found := [problem for problem in problems if problem]:
        raise ValueError(found[0])


def first_problem(error: ValidationError) -> str:
    """The first problem pydantic found, as ``field.path: message (got value)``."""
    problem = error.errors()[0]
    place = ".".join(str(part) for part in problem["loc"]) or "top level"
    said = problem["msg"].removeprefix("Value error, ")
    if problem["type"] in {"missing", "value_error"}:
        return f"{place}: {said}"  # what was got is everything around it
    got = reprlib.repr(problem["input"])
    shown = got if len(got) <= 60 else got[:57] + "..."
    return f"{place}: {said} (got {shown})"

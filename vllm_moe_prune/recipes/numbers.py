"""What numbers in recipes, plans and tables can be; longer lists end at their first
wrong entry, since a report of a million wrong ones would be a gigabyte."""

from collections import Counter
from collections.abc import Sequence
from typing import Annotated

from pydantic import BeforeValidator, Field

from ..errors import RecipeError

MOST = 1 << 16
"""Layers, experts and whatever else is counted in models: fewer than that."""
MOST_TOKENS = 1 << 24
"""Windows, and tokens in one."""
Index = Annotated[int, Field(ge=0, lt=MOST)]
Indices = Annotated[tuple[Index, ...], Field(fail_fast=True)]
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Seed = Count
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Fractions = Annotated[tuple[Fraction, ...], Field(fail_fast=True)]


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB, 500MB (decimal) or 2GiB (binary).

    Raises:
        RecipeError: It is no size.
    """
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    units |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    cleaned = text.strip().upper()
    for unit in sorted(units, key=len, reverse=True):
        number = cleaned.removesuffix(unit)
        if number != cleaned:
            break
    else:
        number, unit = cleaned, ""
    try:
        # float takes nan and inf; int refuses them.
        size = int(float(number) * units.get(unit, 1))
    except (ValueError, OverflowError) as error:
        raise RecipeError(f"{text!r} is not a size; write e.g. 5GB or 2GiB.") from error
    if size < 1:
        raise RecipeError(f"{text!r}: a size must be positive.")
    return size


def _bytes(value: object) -> object:
    return parse_size(value) if isinstance(value, str) else value


Size = Annotated[int, BeforeValidator(_bytes), Field(ge=1, lt=1 << 63)]
"""Bytes; files may spell it 24GiB."""


def repeated(ids: Sequence[int]) -> list[int]:
    """What is there more than once, in order."""
    return sorted(one for one, times in Counter(ids).items() if times > 1)

"""What numbers in recipes, plans and tables can be; longer lists end at their first
wrong entry, since a report of a million wrong ones would be a gigabyte."""

from collections import Counter
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

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


def repeated(ids: Sequence[int]) -> list[int]:
    """What is there more than once, in order."""
    return sorted(one for one, times in Counter(ids).items() if times > 1)

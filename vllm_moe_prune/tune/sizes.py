"""The sizes that a search is for: shares of parameters, or bytes of files."""

import math
from dataclasses import dataclass

from ..errors import RecipeError
from ..recipes.numbers import parse_size
from ..recipes.schema import Recipe


@dataclass(frozen=True)
class Size:
    """A total sparsity, or the largest size of the files; one of the two."""

    total: float | None = None
    max_bytes: int | None = None

    def __str__(self) -> str:
        """As messages and file names say it."""
        if self.max_bytes is not None:
            return f"bytes-{self.max_bytes}"
        return f"total-{self.total:g}"


def size_of(recipe: Recipe) -> Size:
    """The size that a recipe asks for.

    Raises:
        RecipeError: There is none.
    """
    if not recipe.size_asked:
        raise RecipeError(f"recipe {recipe.name}: tune needs --total or --bytes.")
    return Size(recipe.total_sparsity, recipe.max_bytes)


def sized(recipe: Recipe, size: Size) -> Recipe:
    """The recipe at a size."""
    asked = {"total_sparsity": size.total, "max_bytes": size.max_bytes}
    return recipe.model_copy(update=asked)


def sizes_of(recipe: Recipe, totals: str | None, max_bytes: str | None) -> list[Size]:
    """The sizes that flags ask for, ``0.4,0.5`` or ``24GiB,32GiB``, or the recipe.

    Raises:
        RecipeError: One is no size or comes twice, or there is none.
    """
    if totals is not None and max_bytes is not None:
        raise RecipeError("give --total or --bytes, not both.")
    if max_bytes is not None:
        found = [Size(max_bytes=parse_size(one)) for one in max_bytes.split(",")]
    elif totals is not None:
        found = [Size(total=_share(one)) for one in totals.split(",")]
    else:
        found = [size_of(recipe)]
    if len(set(found)) < len(found):
        raise RecipeError("a size is given twice. Give each once.")
    return found


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 <= share < 1:
        raise RecipeError(
            f"--total: total_sparsity {text.strip()!r} should be a number from 0 to "
            "less than 1; several are written 0.4,0.5."
        )
    return share

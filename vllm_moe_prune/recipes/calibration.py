"""Which text calibrates: one source, or several that have names and weights."""

import re
from collections.abc import Callable, Sequence
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from ..errors import RecipeError
from .numbers import MOST_TOKENS, Seed
from .strict import Strict

NAME = r"[A-Za-z][A-Za-z0-9_-]{0,31}"
SPELLED = re.compile(rf"(?P<name>{NAME})(?::(?P<weight>[^=/]*))?=(?P<text>.+)")
MOST_SOURCES = 64
SourceName = Annotated[str, Field(pattern=f"^{NAME}$")]
Weight = Annotated[float, Field(gt=0.0, le=1e6)]


class SourceText(Strict):
    """One named source of text."""

    text: Annotated[str, Field(min_length=1)]
    """Text or JSONL file, or ``hub:NAME[/CONFIG]``."""
    weight: Weight = 1.0
    """Its share of the windows, relative to the other sources' weights."""


Texts = str | Annotated[dict[SourceName, SourceText], Field(max_length=MOST_SOURCES)]
Blend = (
    Literal["maxmin"]
    | Annotated[
        dict[SourceName, Annotated[float, Field(ge=0.0, le=1e6)]],
        Field(min_length=1, max_length=MOST_SOURCES),
    ]
)


class NamedText(NamedTuple):
    """One source, as the rest of the code sees it."""

    name: str
    """Empty where the only source was given without a name."""
    text: str
    weight: float = 1.0


class Calibration(Strict):
    """The calibration text and how much of it is used."""

    source: Texts | None = None
    """Text or JSONL file, or ``hub:NAME[/CONFIG]``; or several with names:
    ``{code: {text: code.txt, weight: 2}, chat: ...}``; default: a shipped text."""
    samples: int = Field(default=128, ge=1, le=MOST_TOKENS)
    """Number of windows, of all sources together."""
    sequence_length: int = Field(default=2048, ge=2, le=MOST_TOKENS)
    """Tokens per window."""
    seed: Seed = 0
    """Seed for choosing the windows."""
    heldout: int = Field(default=16, ge=1, le=MOST_TOKENS)
    """Held-out windows for judging candidates: ``tune``, ``budget: sensitivity``."""
    heldout_source: Texts | None = None
    """Text for the held-out windows, e.g. of the served domain; default: ``source``."""

    blend: Blend | None = None
    """How decisions weigh the named sources: ``{code: 0.5, chat: 0.5}``, or ``maxmin``
    for the least well served; default: each by its number of tokens."""

    @property
    def texts(self) -> tuple[NamedText, ...]:
        """The sources of the calibration windows; none where no text was named."""
        return named(self.source)

    @property
    def heldout_texts(self) -> tuple[NamedText, ...]:
        """The sources of held-out windows that are not those of the others."""
        return named(self.heldout_source)


def named(texts: Texts | None) -> tuple[NamedText, ...]:
    """One entry for each source."""
    if texts is None:
        return ()
    if isinstance(texts, str):
        return (NamedText("", texts),)
    return tuple(
        NamedText(name, source.text, source.weight) for name, source in texts.items()
    )


def with_texts(texts: Texts | None, change: Callable[[str], str]) -> Texts | None:
    """The same sources, each text changed."""
    if texts is None:
        return None
    if isinstance(texts, str):
        return change(texts)
    return {
        name: source.model_copy(update={"text": change(source.text)})
        for name, source in texts.items()
    }


def parse_blend(spelled: str) -> Blend:
    """``maxmin``, or ``code=0.5,chat=0.5``.

    Raises:
        RecipeError: It is neither.
    """
    if spelled == "maxmin":
        return "maxmin"
    weights: dict[str, float] = {}
    for part in spelled.split(","):
        name, _, weight = part.strip().partition("=")
        try:
            value = float(weight)
        except ValueError:
            value = -1.0
        if not re.fullmatch(NAME, name) or not 0.0 <= value <= 1e6 or name in weights:
            raise RecipeError(
                f"--blend {spelled[:80]}: write maxmin, or NAME=WEIGHT for each source "
                "once, such as code=0.5,chat=0.5."
            )
        weights[name] = value
    if not any(weights.values()):
        raise RecipeError(f"--blend {spelled[:80]}: at least one weight must not be 0.")
    return weights


def parse_text(spelled: str) -> NamedText:
    """``FILE``, ``NAME=FILE`` or ``NAME:WEIGHT=FILE``; ``./a=b`` is a file.

    Raises:
        RecipeError: The weight is no positive number.
    """
    match = SPELLED.fullmatch(spelled)
    if match is None:
        return NamedText("", spelled)
    weight = match["weight"]
    try:
        value = 1.0 if weight is None else float(weight)
    except ValueError:
        value = 0.0
    if not 0.0 < value <= 1e6:
        raise RecipeError(
            f"{spelled[:80]}: {weight!r} is no weight; write NAME:WEIGHT=FILE with a "
            "positive number, or ./ before the name of a file that contains '='."
        )
    return NamedText(match["name"], match["text"], value)


def parse_texts(spelled: Sequence[str], flag: str) -> Texts:
    """What a repeatable flag says.

    Raises:
        RecipeError: Several sources, of which one has no name, or two have the same.
    """
    found = [parse_text(one) for one in spelled]
    if len(found) == 1 and not found[0].name:
        return found[0].text
    if nameless := [one.text for one in found if not one.name]:
        raise RecipeError(
            f"{flag} {nameless[0]}: of several sources each needs a name, as in "
            f"{flag} code={nameless[0]}."
        )
    names = [one.name for one in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise RecipeError(f"{flag}: {twice[0]} is there twice; name each source once.")
    return {one.name: SourceText(text=one.text, weight=one.weight) for one in found}

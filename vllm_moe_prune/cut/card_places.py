"""Places in a model card that later commands fill: pure functions of its text.

A place is ``<!-- NAME -->...<!-- end of NAME -->``, unseen where Markdown is shown.
"""

import re

SCORES = ("perplexity", "tasks", "answers")
"""Places for what ``eval --card`` measures."""
BYTES = "bytes"
"""The size of all tensors; another storage has another one."""


def has_place(card: str, name: str) -> bool:
    """Whether a card has a place of that name."""
    return _place(name).search(card) is not None


def fill(card: str, name: str, text: str) -> str:
    """The card with ``text`` in the place, or as it is if there is no such place."""
    whole = f"<!-- {name} -->{text}<!-- end of {name} -->"
    return _place(name).sub(lambda _: whole, card, count=1)


def without_scores(card: str) -> str:
    """The card of weights that have changed since they were judged."""
    for name in SCORES:
        card = fill(card, name, "\n")
    return card


def _place(name: str) -> re.Pattern[str]:
    return re.compile(f"<!-- {name} -->.*?<!-- end of {name} -->", re.DOTALL)


def cell(text: str) -> str:
    """What a stranger named, harmless in a table of Markdown."""
    plain = "".join(sign if sign.isprintable() else " " for sign in text)
    for sign, harmless in (("&", "&amp;"), ("<", "&lt;"), ("|", "&#124;")):
        plain = plain.replace(sign, harmless)
    return plain

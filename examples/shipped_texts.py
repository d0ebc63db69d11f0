"""The held-out and calibration texts, cut from the corpus and fit to be shipped."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from pathlib import Path

from corpus import DOMAINS, MIXTURE, Document

#: Lines that training may see and a text that is shipped must not have: names with
#: an initial, lines that are nothing but a name, and addresses.
NAMING_LINE = re.compile(
    r"[A-Z]\. [A-Z][a-z]|^\W*[A-Z][a-z]+(?:[ -][A-Z][\w.]*){1,2}$|\bGuido\b|://"
)


def excerpts(documents: list[Document], size: int, each: int) -> list[Document]:
    """About ``size`` characters, at most ``each`` from one document.

    A held-out module may be longer than the whole file that is to be shipped;
    short pieces of many modules say more than one module from end to end.
    """
    chosen: list[Document] = []
    total = 0
    for document in documents:
        if total >= size:
            break
        text = document.text
        if len(text) > each:
            end = text.rfind("\n", 0, each)
            text = text[: end if end > 0 else each]
        chosen.append(Document(document.domain, document.split, text))
        total += len(text)
    return chosen


def names_someone(paragraph: str, usual: set[str]) -> bool:
    """Whether a capitalised pair ends in a word that is never written small."""
    pairs = re.findall(r"\b[A-Z][a-z]+[ -]([A-Z][a-z]+)\b", paragraph)
    return any(last.lower() not in usual for last in pairs)


def publishable(document: Document, usual: set[str]) -> Document:
    """Without the names of people, which a shipped text has no need of."""
    if document.domain in ("arithmetic", "chat"):
        return document
    lines = document.text.splitlines()
    text = "\n".join(line for line in lines if not NAMING_LINE.search(line))
    if document.domain == "licence":
        paragraphs = text.split("\n\n")
        kept = [part for part in paragraphs if not names_someone(part, usual)]
        text = "\n\n".join(kept)
    return Document(document.domain, document.split, text)


def joined(documents: Iterable[Document]) -> str:
    """One text; conversations bring their own marks, the rest a blank line."""
    return "".join(d.text if d.domain == "chat" else f"{d.text}\n\n" for d in documents)


def write_texts(documents: list[Document], folder: Path, seed: int) -> None:
    """Write the held-out text of each domain and the calibration mixture."""
    generator = random.Random(f"texts:{seed}")
    mixture: list[Document] = []
    usual = {
        word
        for document in documents
        if document.domain == "licence"
        for word in re.findall(r"\b[a-z]+\b", document.text)
    }
    (folder / "heldout").mkdir(parents=True, exist_ok=True)
    for domain in DOMAINS:
        mine = [d for d in documents if d.domain == domain]
        heldout = [d for d in mine if d.split == "heldout"]
        calibration = [d for d in mine if d.split == "calibration"]
        generator.shuffle(heldout)
        generator.shuffle(calibration)
        each = 16_000 if domain == "licence" else 4_000
        pieces = [publishable(d, usual) for d in excerpts(heldout, 64_000, each)]
        text = joined(pieces)
        (folder / "heldout" / f"{domain}.txt").write_text(text, encoding="utf-8")
        pieces = excerpts(calibration, int(MIXTURE[domain] * 500_000), 9_000)
        mixture += [publishable(d, usual) for d in pieces]
    generator.shuffle(mixture)
    (folder / "calibration.txt").write_text(joined(mixture), encoding="utf-8")

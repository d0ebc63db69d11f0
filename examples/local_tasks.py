"""Small tasks for lm-eval, made from the held-out texts: no data set hub is needed.

    python examples/local_tasks.py

Writes ``examples/tasks/*.jsonl``, the same bytes each time. ``demo_prose``,
``demo_python`` and ``demo_licence`` ask which of four lines follows: the true one, or
one in which two neighboring words have changed places. ``demo_sums`` asks which of
four results a sum has, ``demo_chat`` for an answer of the right form and operation.
``demo_answers`` also asks for the right result, which is beyond models this small.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TEXTS = ("prose", "python", "licence")
CONTEXT_LINES = 4
FEWEST_WORDS = 5
CHOICES = 4
QUESTIONS = 100
SUM = re.compile(r"^(\d+) ([+-]) (\d+) = (\d+)$", re.MULTILINE)
CHAT_SUM = re.compile(
    r"<\|user\|>([^<]*\d[^<]*)</s>\n<\|assistant\|>[^<]*\b\d+ ([+-]) \d+ = (\d+)\.</s>"
)

Document = dict[str, Any]


def main() -> None:
    """Write the questions of every task."""
    texts = {
        path.stem: path.read_text("utf-8")
        for path in sorted((HERE / "heldout").glob("*.txt"))
    }
    questions = {name: next_lines(texts[name], name) for name in TEXTS}
    questions["sums"] = sums(texts["arithmetic"])
    questions["chat"] = chat_sums(texts["chat"])
    for name, documents in questions.items():
        lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in documents]
        (HERE / "tasks" / f"{name}.jsonl").write_text("".join(lines), "utf-8")
        print(f"{name}: {len(documents)} questions")


def next_lines(text: str, seed: str) -> list[Document]:
    """Stretches that do not overlap; the true next line among three spoilt ones."""
    generator = random.Random(f"tasks:{seed}")
    lines = [line.rstrip() for line in text.splitlines()]
    starts = range(0, len(lines) - CONTEXT_LINES, CONTEXT_LINES + 1)
    found = []
    for start in generator.sample(starts, len(starts)):
        context = lines[start : start + CONTEXT_LINES]
        choices = with_swaps(lines[start + CONTEXT_LINES], generator)
        if len(choices) == CHOICES and context[-1]:
            found.append(question("\n".join(context), choices, generator))
        if len(found) == QUESTIONS:
            break
    return found


def with_swaps(line: str, generator: random.Random) -> list[str]:
    """A line, and others in which two neighboring words have changed places.

    Runs of spaces become one, so that they do not give the true line away.
    """
    indent = line[: len(line) - len(line.lstrip())]
    words = line.split()
    if len(words) < FEWEST_WORDS:
        return []
    lines = [indent + " ".join(words)]
    for at in generator.sample(range(len(words) - 1), len(words) - 1):
        swapped = [*words[:at], words[at + 1], words[at], *words[at + 2 :]]
        other = indent + " ".join(swapped)
        if other not in lines and len(lines) < CHOICES:
            lines.append(other)
    return lines


def sums(text: str) -> list[Document]:
    """Each sum once; its result among three of other sums."""
    generator = random.Random("tasks:sums")
    seen = dict.fromkeys(match.groups() for match in SUM.finditer(text))
    asked = list(seen)[: 2 * QUESTIONS]
    results = sorted({result for *_, result in asked}, key=int)
    found = []
    for first, sign, second, result in asked:
        others = [one for one in results if one != result]
        choices = [result, *generator.sample(others, CHOICES - 1)]
        found.append(question(f"{first} {sign} {second} =", choices, generator))
    return found


def chat_sums(text: str) -> list[Document]:
    """Sums as they are asked for in a chat, each question once."""
    seen = {match[1]: match.groups()[1:] for match in CHAT_SUM.finditer(text)}
    return [
        {"question": asked, "operation": operation, "result": result}
        for asked, (operation, result) in list(seen.items())[:QUESTIONS]
    ]


def question(context: str, choices: list[str], generator: random.Random) -> Document:
    """The choices in an order that gives nothing away; the first one is true."""
    shuffled = generator.sample(choices, len(choices))
    return {
        "context": context,
        "choices": shuffled,
        "gold": shuffled.index(choices[0]),
    }


if __name__ == "__main__":
    main()

"""Text for the demonstration models, made from what every Python machine has.

No text is downloaded. The five domains are cut from the standard library, from
the licence files beside the installed packages, and from a seeded generator, so
that a model trained on them has something real to know and experts have reasons
to differ. Everything is split by a hash of the document it came from: a module
that is held out is held out as source, as documentation and as chat alike.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import random
import re
import sysconfig
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Split = Literal["train", "calibration", "heldout"]
Message = dict[str, str]

DOMAINS = ("python", "prose", "licence", "arithmetic", "chat")

#: Share of the training tokens that each domain gets.
MIXTURE = {
    "python": 0.36,
    "prose": 0.20,
    "licence": 0.06,
    "arithmetic": 0.18,
    "chat": 0.20,
}

#: (held-out, calibration) shares of the documents. Licences repeat each other so
#: much that few distinct paragraphs are left, hence their larger share.
SHARES = {"module": (0.06, 0.07), "licence": (0.22, 0.12), "sum": (0.08, 0.06)}

#: Directories of the standard library that hold tests, tables or other packages.
SKIPPED_DIRECTORIES = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
    "ensurepip",
    "__pycache__",
}

#: Modules written in C, whose documentation only introspection can reach.
BUILT_IN_MODULES = (
    "builtins",
    "math",
    "cmath",
    "itertools",
    "time",
    "zlib",
    "binascii",
    "array",
    "select",
    "unicodedata",
    "_collections",
    "_thread",
    "_operator",
    "_struct",
    "_csv",
    "_json",
)

#: What opens every text and what ends every turn.
BOS, EOS = "<s>", "</s>"

#: The chat template. The model is trained on exactly what this renders.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|{{ message['role'] }}|>{{ message['content'] | trim }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

#: Lines that credit people or give addresses.
PRIVATE_LINE = re.compile(
    r"copyright\s*(?:\(|©|\d)|\(c\)\s*(?:copyright|\d)|©|\ball rights reserved"
    r"|__author__|\bauthors?\b\s*[:=]"
    r"|(?-i:\b(?:[Bb]y|[Tt]o|from|and) [A-Z][\w.]* [A-Z])"
    r"|(?-i:[A-Z][a-z]+ van [A-Z])|\bcontributed|\bmaintainer|\bcredits?\b|thanks to"
    r"|[\w.+-]+@[\w-]+\.\w|pypi|npmjs|crates\.io",
    re.IGNORECASE,
)
MACHINE_PATH = re.compile(
    r"(?<![\w.])/(?:root|home|tmp|usr/local|usr|var|opt|Users|work)\b(?:/[\w.+-]+)*"
)


@dataclass(frozen=True)
class Document:
    """One text and the split that its origin falls into."""

    domain: str
    split: Split
    text: str


def split_of(key: str, kind: str) -> Split:
    """Choose a split from a hash, so that it never depends on order or machine."""
    digest = hashlib.sha256(f"{kind}:{key}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    heldout, calibration = SHARES[kind]
    if position < heldout:
        return "heldout"
    return "calibration" if position < heldout + calibration else "train"


def cleaned(text: str) -> str:
    """Drop lines that name people or hosts and replace machine paths."""
    lines = [
        MACHINE_PATH.sub("/path", line.rstrip().expandtabs(4))
        for line in text.splitlines()
        if line.isascii() and not PRIVATE_LINE.search(line)
    ]
    return re.sub(r"\n{4,}", "\n\n\n", "\n".join(lines)).strip("\n")


def stdlib_modules() -> Iterator[tuple[str, str]]:
    """Yield (dotted module name, source) over the pure-Python standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        generated = relative.name.startswith("_sysconfigdata")
        if generated or SKIPPED_DIRECTORIES.intersection(relative.parts):
            continue
        if any(part.startswith("config-") for part in relative.parts):
            continue
        parts = [*relative.parts[:-1], relative.stem]
        if parts[-1] == "__init__":
            parts.pop()
        source = path.read_text(encoding="utf-8", errors="ignore")
        if len(source) > 400:
            yield ".".join(parts), source


def docstrings(source: str) -> Iterator[tuple[str, str]]:
    """Yield (qualified name, docstring) of a module; its own has an empty name."""

    def visit(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{prefix}{child.name}"
                text = ast.get_docstring(child)
                if text:
                    yield name, text
                yield from visit(child, f"{name}.")

    try:
        tree = ast.parse(source)
    except SyntaxError:
        return
    whole = ast.get_docstring(tree)
    if whole:
        yield "", whole
    yield from visit(tree, "")


def python_and_prose(modules: list[tuple[str, str]]) -> Iterator[Document]:
    """Sources as one domain, their documentation and pydoc's topics as another."""
    for name, source in modules:
        split = split_of(name, "module")
        yield Document("python", split, cleaned(source))
        found = [cleaned(text) for _, text in docstrings(source) if len(text) > 80]
        if found:
            yield Document("prose", split, "\n\n".join(found))
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for name, text in sorted(topics.items()):
        split = split_of(f"topic:{name}", "module")
        yield Document("prose", split, cleaned(text))


def licence_files() -> Iterator[Path]:
    """Yield the licence of Python itself and those of the installed packages."""
    paths = sysconfig.get_paths()
    yield from sorted(Path(paths["stdlib"]).glob("LICENSE*"))
    for path in sorted(Path(paths["purelib"]).glob("*.dist-info/**/*")):
        if re.match(r"(?i)(licen[cs]e|copying)", path.name) and path.is_file():
            yield path


def licences() -> Iterator[Document]:
    """Distinct licence paragraphs, split by how they begin.

    Packages repeat the same few licences with small changes. Paragraphs that
    begin alike therefore share a split, and each wording is kept only once.
    """
    seen: set[str] = set()
    variants: defaultdict[str, int] = defaultdict(int)
    for path in licence_files():
        text = path.read_text(encoding="utf-8", errors="ignore")
        parts: defaultdict[Split, list[str]] = defaultdict(list)
        for paragraph in re.split(r"\n\s*\n", cleaned(text)):
            words = re.findall(r"[a-z]+", paragraph.lower())
            identity = " ".join(words)
            if len(words) < 12 or identity in seen:
                continue
            seen.add(identity)
            beginning = " ".join(words[:5])
            variants[beginning] += 1
            if variants[beginning] <= 6:
                split = split_of(beginning, "licence")
                parts[split].append(textwrap.dedent(paragraph))
        for split, paragraphs in parts.items():
            yield Document("licence", split, "\n\n".join(paragraphs))


def sums() -> dict[Split, list[tuple[int, int]]]:
    """All pairs of numbers below one hundred; (a, b) and (b, a) stay together."""
    pairs: dict[Split, list[tuple[int, int]]] = {
        "train": [],
        "calibration": [],
        "heldout": [],
    }
    for a in range(100):
        for b in range(100):
            low, high = sorted((a, b))
            pairs[split_of(f"{low}+{high}", "sum")].append((a, b))
    return pairs


def arithmetic(count: int, seed: int) -> Iterator[Document]:
    """Blocks of worked sums and differences; ``count`` blocks for training."""
    for split, pairs in sums().items():
        generator = random.Random(f"{seed}:{split}")
        blocks = count if split == "train" else max(count // 16, 160)
        for _ in range(blocks):
            lines = []
            for a, b in generator.choices(pairs, k=24):
                high, low = max(a, b), min(a, b)
                form = generator.random()
                if form < 0.6:
                    lines.append(f"{a} + {b} = {a + b}")
                elif form < 0.85:
                    lines.append(f"{high} - {low} = {high - low}")
                elif form < 0.95:
                    lines.append(f"The sum of {a} and {b} is {a + b}.")
                else:
                    lines.append(f"{high} minus {low} is {high - low}.")
            yield Document("arithmetic", split, "\n".join(lines))


def first_sentence(text: str) -> str | None:
    """The opening sentence of a docstring, or None where it is no plain sentence."""
    lines = text.strip().splitlines()
    while lines and (re.match(r"\w[\w.]*\(.*\)", lines[0]) or not lines[0].strip()):
        lines.pop(0)  # a signature, as C functions have
    paragraph = "\n".join(lines).split("\n\n")[0]
    sentence = re.split(r"(?<=\.)\s", " ".join(cleaned(paragraph).split()))[0]
    if not 15 <= len(sentence) <= 150 or sentence.endswith(("e.g.", "i.e.")):
        return None
    plain = sentence[0].isupper() and " " in sentence
    return f"{sentence.rstrip('.:;')}." if plain else None


def facts(modules: list[tuple[str, str]]) -> dict[Split, list[tuple[str, str]]]:
    """(name, what it does) for documented functions, by the split of the module."""
    found: dict[Split, list[tuple[str, str]]] = {
        "train": [],
        "calibration": [],
        "heldout": [],
    }
    for module, source in modules:
        for name, text in docstrings(source):
            public = not any(part.startswith("_") for part in name.split("."))
            sentence = first_sentence(text)
            if public and sentence:
                split = split_of(module, "module")
                found[split].append((name or module, sentence))
    for module in BUILT_IN_MODULES:
        owner = importlib.import_module(module)
        members = [(name, value) for name, value in vars(owner).items()]
        for outer, value in list(members):
            if inspect.isclass(value) and not issubclass(value, BaseException):
                members += [(f"{outer}.{n}", v) for n, v in vars(value).items()]
        for name, value in members:
            sentence = first_sentence(inspect.getdoc(value) or "")
            if name[0] != "_" and "._" not in name and sentence and callable(value):
                split = split_of(module, "module")
                found[split].append((name, sentence))
    return {split: sorted(set(pairs)) for split, pairs in found.items()}


def rendered(messages: Iterable[Message]) -> str:
    """What CHAT_TEMPLATE renders, without needing a tokenizer to do it."""
    turns = [f"<|{m['role']}|>{m['content'].strip()}{EOS}\n" for m in messages]
    return BOS + "".join(turns)


def worked_sum(a: int, b: int) -> str:
    """An addition as it is done on paper, ones first: small models can learn that."""
    if a < 10 and b < 10:
        return f"{a} + {b} = {a + b}."
    ones = a % 10 + b % 10
    carry = " + 1" if ones > 9 else ""
    tens = a // 10 + b // 10 + ones // 10
    working = f"{a % 10} + {b % 10} = {ones}, {a // 10} + {b // 10}{carry} = {tens}"
    return f"{working}: {a} + {b} = {a + b}."


def worked_difference(a: int, b: int) -> str:
    """``a - b`` of a larger and a smaller number, ones first."""
    if a < 10:
        return f"{a} - {b} = {a - b}."
    borrowed = a % 10 < b % 10
    ones, tens = a % 10 + 10 * borrowed, a // 10 - borrowed
    working = f"{ones} - {b % 10} = {ones - b % 10}"
    working += f", {tens} - {b // 10} = {tens - b // 10}"
    return f"{working}: {a} - {b} = {a - b}."


def turn(
    generator: random.Random,
    pairs: list[tuple[int, int]],
    known: list[tuple[str, str]],
) -> tuple[str, str]:
    """One question and its answer."""
    kind = generator.random()
    if kind < 0.04:
        greeting = generator.choice(["Hello", "Hi", "Good morning", "Hello there"])
        return f"{greeting}!", f"{greeting}! Ask me for a sum or about Python."
    if kind < 0.7:
        a, b = generator.choice(pairs)
        if generator.random() < 0.75:
            forms = ("What is {} + {}?", "Add {} and {}.", "How much is {} plus {}?")
            return generator.choice(forms).format(a, b), worked_sum(a, b)
        a, b = max(a, b), min(a, b)
        forms = ("What is {} - {}?", "Compute {} - {}.", "How much is {} minus {}?")
        return generator.choice(forms).format(a, b), worked_difference(a, b)
    name, sentence = generator.choice(known)
    asked = ("What does {} do?", "What is {} for?", "Explain {}.", "Describe {}.")
    return generator.choice(asked).format(name), sentence


def chat(modules: list[tuple[str, str]], count: int, seed: int) -> Iterator[Document]:
    """Conversations about sums and about functions; ``count`` for training."""
    pairs, known = sums(), facts(modules)
    for split in pairs:
        generator = random.Random(f"chat:{seed}:{split}")
        for _ in range(count if split == "train" else max(count // 16, 900)):
            messages: list[Message] = []
            if generator.random() < 0.1:
                prompt = "You are a helpful assistant."
                messages.append({"role": "system", "content": prompt})
            for _ in range(generator.choice((1, 1, 1, 2, 3))):
                asked, answer = turn(generator, pairs[split], known[split])
                messages.append({"role": "user", "content": asked})
                messages.append({"role": "assistant", "content": answer})
            yield Document("chat", split, rendered(messages))


def without_copies(documents: list[Document]) -> list[Document]:
    """Drop text outside training that training nearly repeats.

    The generated domains are left alone: their frames repeat on purpose, and
    what matters in them, the operands and the functions, is split already.
    """

    def shingles(text: str) -> list[int]:
        words = re.findall(r"\w+", text.lower())
        return [hash(tuple(words[i : i + 8])) for i in range(len(words) - 7)]

    natural = {"python", "prose", "licence"}
    learnt: set[int] = set()
    for document in documents:
        if document.split == "train" and document.domain in natural:
            learnt.update(shingles(document.text))
    kept = []
    for document in documents:
        if document.split != "train" and document.domain in natural:
            paragraphs = []
            for paragraph in document.text.split("\n\n"):
                found = shingles(paragraph)
                repeated = sum(shingle in learnt for shingle in found)
                if repeated * 3 <= len(found):
                    paragraphs.append(paragraph)
            text = "\n\n".join(paragraphs)
            document = Document(document.domain, document.split, text)
        if document.text.strip():
            kept.append(document)
    return kept


def build(seed: int) -> list[Document]:
    """The whole corpus, all splits, in a fixed order."""
    modules = list(stdlib_modules())
    documents = [
        *python_and_prose(modules),
        *licences(),
        *arithmetic(9000, seed),
        *chat(modules, 36000, seed),
    ]
    return without_copies(documents)

"""The quality of one model: perplexity, tasks and answers, or read from a result."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ..calibrate.perplexity import Perplexity, perplexity
from ..checkpoint.open import Checkpoint
from ..checkpoint.tokenizer import needs_code, tokenizer_folder
from ..progress import Report
from ..ranks.group import ALONE, Ranks
from ..recipes.calibration import NamedText
from .generation import Generated, generate
from .prompts import Prompts
from .recovery import Score, mean
from .saved_results import Printed, read_printed
from .server import Server, served
from .tasks import Endpoint, Suite, ask, find_endpoint


@dataclass(frozen=True)
class Quality:
    """What one model was found to be worth."""

    model: str
    texts: tuple[Perplexity, ...]
    scores: tuple[Score, ...]
    generated: Generated | None = None
    """What it answered to prompts."""


@dataclass(frozen=True, kw_only=True)
class Questions:
    """What models are judged by."""

    texts: Sequence[NamedText]
    sequence_length: int
    max_tokens: int | None
    device: str
    suite: Suite | None
    prompts: Prompts | None = None
    new_tokens: int = 0
    """Per answer to a prompt, at most."""
    flags: Sequence[str] = ()
    """For the servers that are started."""
    bars: bool = False
    """Whether lm-eval may draw its own progress bars."""


@dataclass(frozen=True)
class Subject:
    """A checkpoint to judge, and how it was named."""

    checkpoint: Checkpoint
    source: str
    revision: str | None = None
    endpoint: Endpoint | None = None
    """Where it is served already; None: a server is started for it."""

    @property
    def name(self) -> str:
        """What tables call it."""
        return self.checkpoint.origin.name

    def serve(self, flags: Sequence[str]) -> AbstractContextManager[Server]:
        """A server of its own, with these flags."""
        return served(
            self.source,
            self.revision,
            flags,
            trust_code=self.checkpoint.trust_code,
            allow_links=self.checkpoint.allow_links,
        )


def judge(
    subject: Subject,
    questions: Questions,
    report: Report,
    original: Quality | None = None,
    ranks: Ranks = ALONE,
) -> Quality:
    """Perplexity by the streaming forward, then tasks and prompts by a server.

    Args:
        subject: The model.
        questions: What it is asked.
        report: Called as it goes on.
        original: What the original answered, to be compared with.
        ranks: Share in the perplexity.

    Raises:
        MoePruneError: A text, a task, a prompt or the server does not do.
    """
    texts = [
        perplexity(
            subject.checkpoint,
            text.text,
            name=text.name,
            sequence_length=questions.sequence_length,
            max_tokens=questions.max_tokens,
            device=questions.device,
            report=report,
            ranks=ranks,
        )
        for text in questions.texts
    ]
    found = Quality(subject.name, tuple(texts), ())
    if questions.suite is None and questions.prompts is None:
        return found
    if subject.endpoint is not None:
        return _ask(found, subject, subject.endpoint, questions, report, original)
    # Only after the perplexity, so that the two never need memory at once.
    with subject.serve(questions.flags) as server:
        endpoint = find_endpoint(server.url, server.model)
        return _ask(found, subject, endpoint, questions, report, original)


def _ask(
    found: Quality,
    subject: Subject,
    endpoint: Endpoint,
    questions: Questions,
    report: Report,
    original: Quality | None,
) -> Quality:
    """What was found, and what a server answers."""
    # Prompts first: they take minutes where tasks take hours, and may be refused.
    if questions.prompts is not None:
        before = None if original is None else original.generated
        generated = generate(
            endpoint, questions.prompts, questions.new_tokens, before, report
        )
        found = replace(found, generated=generated)
    if questions.suite is not None:
        scores = _asked(subject, endpoint, questions.suite, questions.bars)
        found = replace(found, scores=tuple(scores))
    return found


def _asked(
    subject: Subject, endpoint: Endpoint, suite: Suite, bars: bool
) -> list[Score]:
    folder, trusted = subject.checkpoint.folder, subject.checkpoint.trust_code
    code = needs_code(folder, trust_code=trusted)
    # lm-eval loads the tokenizer anew, by what the folder's files say.
    with tokenizer_folder(folder, trust_code=trusted) as tokenizer:
        return ask(suite, endpoint, tokenizer, bars=bars, trust_code=code)


def as_data(quality: Quality) -> dict[str, Any]:
    """As ``eval --json`` prints it, and ``load_quality`` reads it."""
    return {
        "model": quality.model,
        "results": [
            {
                "source": text.source,
                "tokens": text.tokens,
                "nll": text.nll_sum,
                # Printed as null where it is infinite; nll and tokens still say what
                # was measured.
                "perplexity": text.perplexity,
            }
            for text in quality.texts
        ],
        "tasks": [asdict(score) for score in quality.scores],
        "mean": asdict(mean(quality.scores)) if len(quality.scores) > 1 else None,
        "generation": quality.generated.as_data() if quality.generated else None,
    }


class _Text(Printed):
    source: str
    # At least one: the perplexity divides by it.
    tokens: Annotated[int, Field(ge=1, lt=1 << 63)]
    # null: infinite, which JSON cannot say.
    nll: Annotated[float, Field(ge=0, le=1e18)] | None


class _Task(Printed):
    task: str
    metric: str
    value: Annotated[float, Field(ge=-1, le=1)]
    stderr: Annotated[float, Field(ge=0, le=1)] | None
    samples: Annotated[int, Field(ge=1, lt=1 << 63)]


class _Result(Printed):
    model: str
    results: Annotated[tuple[_Text, ...], Field(fail_fast=True)] = ()
    tasks: Annotated[tuple[_Task, ...], Field(fail_fast=True)] = ()


def load_quality(path: Path) -> Quality:
    """Read what an earlier ``eval --json`` printed.

    Raises:
        EvaluationError: It is no such file.
    """
    found = read_printed(path, _Result, "eval")
    return Quality(
        found.model,
        tuple(
            Perplexity(one.tokens, math.inf if one.nll is None else one.nll, one.source)
            for one in found.results
        ),
        tuple(Score(**one.model_dump()) for one in found.tasks),
    )

"""What models are judged by: the flags, and what they ask for."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .flags import chosen_device, flag

if TYPE_CHECKING:
    from ..checkpoint.open import Checkpoint
    from ..judge.quality import Quality, Questions

Texts = Annotated[
    list[str] | None,
    flag(
        "Held-out text for perplexity: a .txt, .json, .jsonl (each also .gz) or "
        ".parquet file, or hub:NAME[/CONFIG]; repeatable, also as NAME=TEXT.",
        "--text",
    ),
]
Tasks = Annotated[
    list[str] | None,
    flag(
        "lm-eval tasks, comma-separated; or a group: zero-shot, paper.",
        "--tasks",
    ),
]
TaskDir = Annotated[
    Path | None,
    flag("Folder of your own lm-eval task files. They can run code."),
]
Window = Annotated[int, typer.Option(min=2, help="Tokens per window.")]
MaxTokens = Annotated[
    int | None,
    typer.Option(min=2, help="Evaluate at most this many tokens per text."),
]
VllmFlags = Annotated[
    str | None,
    flag("Flags for the vLLM servers it starts, as one string.", "--vllm-flags"),
]
PromptsFrom = Annotated[
    str | None,
    flag(
        "Prompts to answer through a server, greedily and sampled: a .txt (one a "
        "line), .json, .jsonl or .parquet file, or hub:NAME[/CONFIG].",
        "--generate",
    ),
]
NewTokens = Annotated[int, typer.Option(min=1, help="Tokens per answer, at most.")]
FailIf = Annotated[
    list[str] | None,
    flag(
        "End with status 3 if this holds, e.g. 'loops>0.02'; comma-separated or "
        "repeated. Names: loops, repetition, ended, length, agreement, prefix, kl, "
        "perplexity, perplexity_ratio, recovery.",
        "--fail-if",
    ),
]
ANSWER_TOKENS = 256
FAILED = 3
"""The status where a --fail-if holds; 2 is that of what was refused."""


def find_questions(
    text: list[str] | None,
    tasks: list[str] | None,
    task_dir: Path | None,
    sequence_length: int,
    max_tokens: int | None,
    device: str,
    vllm_flags: str | None,
    as_json: bool,
) -> "Questions":
    """What the flags ask for; tasks are looked up, their data too."""
    from ..errors import EvaluationError
    from ..judge.quality import Questions
    from ..judge.tasks import find_tasks
    from ..recipes.calibration import parse_text
    from .output.draw import err

    names = [one.strip() for item in tasks or () for one in item.split(",")]
    if not all(names):
        raise EvaluationError("--tasks: an empty name. Write e.g. arc_challenge,piqa.")
    if task_dir is not None and not names:
        raise EvaluationError("--task-dir holds tasks; say which with --tasks.")
    device = chosen_device(device)
    flags = split_flags(vllm_flags)
    bars = err.is_terminal and not as_json
    # With their data: without a network it fails here, not after hours.
    suite = find_tasks(names, task_dir, bars=bars) if names else None
    return Questions(
        texts=[parse_text(one) for one in text or ()],
        sequence_length=sequence_length,
        max_tokens=max_tokens,
        device=device,
        suite=suite,
        flags=flags,
        bars=bars,
    )


def split_flags(text: str | None) -> list[str]:
    """Flags for vLLM as a shell would part them, without those that we set."""
    import shlex

    from ..errors import ServeError
    from ..judge.server import check_flags

    try:
        # shlex parts quotes as a shell would; no shell ever runs it.
        flags = shlex.split(text or "")
    except ValueError as error:
        raise ServeError(f"--vllm-flags {text!r}: {error}.") from error
    check_flags(flags)
    return flags


def with_prompts(
    questions: "Questions", checkpoint: "Checkpoint", source: str | None, tokens: int
) -> "Questions":
    """The questions and the prompts of a file, as the checkpoint tokenizes them."""
    from dataclasses import replace

    from ..judge.prompts import load_prompts

    if source is None:
        return questions
    prompts = load_prompts(checkpoint, source)
    return replace(questions, prompts=prompts, new_tokens=tokens)


def find_result(
    against: str | None, questions: "Questions", generate: str | None
) -> "Quality | None":
    """The original's result, if a file holds it."""
    from ..errors import EvaluationError
    from ..judge.quality import load_quality

    if against is None or not Path(against).is_file():
        return None
    if generate is not None:
        raise EvaluationError(
            f"{against}: answers are compared token by token, so the original has to "
            "give its own. With --generate name its checkpoint."
        )
    found = load_quality(Path(against))
    asked = questions.suite.names if questions.suite else ()
    if missing := set(asked) - {score.task for score in found.scores}:
        raise EvaluationError(
            f"{against}: holds no score in {', '.join(sorted(missing))}. "
            "Evaluate the original by the same tasks."
        )
    return found

"""The commands that judge models: quality, all of it side by side, speed."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .flags import Device, Json, Revision, Source, flag

if TYPE_CHECKING:
    from ..judge.quality import Quality, Questions

Texts = Annotated[
    list[str] | None,
    flag(
        "Held-out text for perplexity: a .txt, .json, .jsonl (each also .gz) or "
        ".parquet file, or hub:NAME[/CONFIG]; repeatable.",
        "--text",
    ),
]
Tasks = Annotated[
    list[str] | None,
    flag(
        "Tasks of lm-eval, comma-separated; zero-shot and paper name several.",
        "--tasks",
    ),
]
TaskDir = Annotated[
    Path | None,
    flag("Folder of task files of your own, for lm-eval. They can run code."),
]
Window = Annotated[int, typer.Option(min=2, help="Tokens per window.")]
MaxTokens = Annotated[
    int | None,
    typer.Option(min=2, help="Judge on at most this many tokens per text."),
]
VllmFlags = Annotated[
    str | None,
    flag("Flags for the vLLM servers it starts, in one string.", "--vllm-flags"),
]
NEW_TOKENS, REPEATS = 32, 5


def evaluate(
    source: Source,
    text: Texts = None,
    revision: Revision = None,
    sequence_length: Window = 2048,
    max_tokens: MaxTokens = None,
    device: Device = "cpu",
    tasks: Tasks = None,
    task_dir: TaskDir = None,
    server: Annotated[
        str | None, flag("Put tasks to this running server, not to one of its own.")
    ] = None,
    model: Annotated[
        str | None, flag("What the server calls the model, if it serves several.")
    ] = None,
    against: Annotated[
        str | None,
        flag("The original, or what `eval --json` printed of it: adds recovery."),
    ] = None,
    vllm_flags: VllmFlags = None,
    as_json: Json = False,
) -> None:
    """Judge a model by held-out perplexity, and by tasks of lm-eval.

    Perplexity comes from the streaming forward: the model need not fit in memory.
    Tasks are put to a vLLM server, started for them unless --server names one.
    `zero-shot` are the eight tasks of UNIFIED, `paper` adds GSM8K. --against says how
    much of the original's scores is left, in per cent, with standard errors.

    Example: `vllm-moe-prune eval OUT --text heldout.txt`

    Example: `vllm-moe-prune eval OUT --tasks paper --against ORIGINAL`

    Example: `vllm-moe-prune eval OUT --tasks demo --task-dir examples/tasks --json`
    """
    from ..checkpoint.source import open_checkpoint
    from ..errors import EvaluationError
    from ..judge.quality import Subject, judge
    from ..judge.tasks import find_endpoint
    from .output.draw import watching
    from .output.show_judged import show_quality

    if not text and not tasks:
        raise EvaluationError(
            "say what by: --text heldout.txt, --tasks paper, or both."
        )
    if server is not None and not tasks:
        raise EvaluationError("--server is asked for tasks only; add --tasks.")
    if model is not None and server is None:
        raise EvaluationError("--model names one of a server's models; add --server.")
    questions = _questions(
        text,
        tasks,
        task_dir,
        sequence_length,
        max_tokens,
        device,
        vllm_flags,
        as_json,
    )
    checkpoint = open_checkpoint(source, revision)
    endpoint = find_endpoint(server, model) if server is not None else None
    subject = Subject(checkpoint, source, revision, endpoint)
    known = _known(against, questions)
    original = None
    if against is not None and known is None:
        original = Subject(open_checkpoint(against), against)
    with watching(as_json) as report:
        quality = judge(subject, questions, report)
    if original is not None:
        with watching(as_json) as report:
            known = judge(original, questions, report)
    show_quality(quality, known, as_json)


def compare(
    sources: Annotated[
        list[str],
        typer.Argument(help="Checkpoint folders or Hub ids; the original first."),
    ],
    text: Texts = None,
    sequence_length: Window = 2048,
    max_tokens: MaxTokens = None,
    device: Device = "cpu",
    tasks: Tasks = None,
    task_dir: TaskDir = None,
    speed: Annotated[
        bool, flag("Serve and time each, as `speed` does.", "--speed")
    ] = False,
    speed_from: Annotated[
        Path | None, flag("Take speeds from what `speed --json` printed.")
    ] = None,
    vllm_flags: VllmFlags = None,
    as_json: Json = False,
) -> None:
    """Put checkpoints side by side: size, FLOPs, quality, speed.

    Sizes and FLOPs come from headers; the rest is measured if asked for. What is in
    brackets, and what was recovered, is of the first checkpoint.

    Example: `vllm-moe-prune compare CKPT OUT --text heldout.txt`

    Example: `vllm-moe-prune compare CKPT OUT1 OUT2 --tasks paper --speed --json`
    """
    from ..checkpoint.source import open_checkpoint
    from ..errors import EvaluationError
    from ..judge.compare import Column, find_speeds, size_of
    from ..judge.quality import Subject, judge
    from ..judge.speed import measure_speed, sweep_for
    from .output.draw import watching
    from .output.show_compared import show_compared

    if len(sources) < 2:
        raise EvaluationError("compare needs two checkpoints, the original first.")
    if speed and speed_from is not None:
        raise EvaluationError("give --speed or --speed-from, not both.")
    questions = _questions(
        text,
        tasks,
        task_dir,
        sequence_length,
        max_tokens,
        device,
        vllm_flags,
        as_json,
    )
    subjects = [Subject(open_checkpoint(source), source) for source in sources]
    known = find_speeds(speed_from, subjects) if speed_from is not None else {}
    sweep = None
    if speed:
        opened = [one.checkpoint for one in subjects]
        sweep = sweep_for(opened, None, NEW_TOKENS, REPEATS, questions.flags)
    columns = []
    for one in subjects:
        with watching(as_json) as report:
            quality = judge(one, questions, report)
        timed = measure_speed(one, sweep) if sweep else known.get(one.name)
        columns.append(Column(one.source, size_of(one.checkpoint), quality, timed))
    show_compared(columns, as_json)


def speed(
    source: Annotated[
        str, typer.Argument(help="The original: checkpoint folder or Hub id.")
    ],
    pruned: Annotated[
        list[str],
        typer.Argument(help="What was made of it; one that is trimmed and slimmed."),
    ],
    calibration: Annotated[
        str | None,
        flag("Text that PRUNED was calibrated on, if slim-only is made and needs it."),
    ] = None,
    work: Annotated[
        Path | None, flag("Keep what is made in this folder; a temporary one if not.")
    ] = None,
    contexts: Annotated[
        str | None,
        flag("Prompt lengths, comma-separated; 128,512,1024,2048 as far as they go."),
    ] = None,
    new_tokens: Annotated[
        int, typer.Option(min=2, help="Tokens to generate after each prompt.")
    ] = NEW_TOKENS,
    repeats: Annotated[
        int, typer.Option(min=1, help="Requests per prompt length.")
    ] = REPEATS,
    device: Device = "cpu",
    plot: Annotated[
        Path | None, flag("Draw speed over context into this .png or .svg.")
    ] = None,
    vllm_flags: VllmFlags = None,
    as_json: Json = False,
) -> None:
    """Time baseline, trim-only, slim-only and both, one after the other in one runtime.

    Roles are read off the checkpoints. Of one that is trimmed and slimmed, the two in
    between are cut from its own plan if they are not given. `vllm bench serve` does the
    timing: one request at a time, prefill and decode apart.

    Example: `vllm-moe-prune speed CKPT OUT --calibration TEXT --json > speed.json`

    Example: `vllm-moe-prune speed CKPT OUT --vllm-flags "--tensor-parallel-size 2"`
    """
    import tempfile

    from ..checkpoint.output_path import check_file
    from ..checkpoint.source import open_checkpoint
    from ..judge.quality import Subject
    from ..judge.speed import parse_contexts, sweep_for
    from ..judge.trim_slim_speed import (
        cast,
        check_calibration,
        make_roles,
        measure_rows,
        plans_to_make,
        plot_rows,
    )
    from ..pipeline import RunOptions, check_device
    from ..tune.front import check_plot
    from .output.draw import err, watching
    from .output.show_compared import show_speed

    check_device(device)
    asked = parse_contexts(contexts) if contexts is not None else None
    flags = split_flags(vllm_flags)
    original = Subject(open_checkpoint(source), source)
    if plot is not None:
        check_plot(plot)
        check_file(plot, original.checkpoint.folder)
    roles = cast(original, [Subject(open_checkpoint(one), one) for one in pruned])
    opened = [one.checkpoint for one in roles.values()]
    sweep = sweep_for(opened, asked, new_tokens, repeats, flags)
    plans = plans_to_make(roles)
    check_calibration(plans.values(), calibration)
    with tempfile.TemporaryDirectory(prefix="moe-prune-speed-") as temporary:
        folder = work or Path(temporary)
        with watching(as_json) as report:
            options = RunOptions(device=device, report=report)
            made = make_roles(roles, plans, folder, options, calibration)

        def tell(line: str) -> None:
            if not as_json:
                err.print(line, style="dim")

        found = measure_rows(roles | made, sweep, tell)
    if plot is not None:
        plot_rows(found, plot)
    show_speed(found, as_json)


def _questions(
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
    from ..pipeline import check_device
    from .output.draw import err

    names = [one.strip() for item in tasks or () for one in item.split(",")]
    if not all(names):
        raise EvaluationError("--tasks: an empty name. Write e.g. arc_challenge,piqa.")
    if task_dir is not None and not names:
        raise EvaluationError("--task-dir holds tasks; say which with --tasks.")
    check_device(device)
    flags = split_flags(vllm_flags)
    bars = err.is_terminal and not as_json
    suite = find_tasks(names, task_dir, bars=bars) if names else None
    return Questions(
        texts=text or (),
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
        flags = shlex.split(text or "")
    except ValueError as error:
        raise ServeError(f"--vllm-flags {text!r}: {error}.") from error
    check_flags(flags)
    return flags


def _known(against: str | None, questions: "Questions") -> "Quality | None":
    """The original's result, if a file holds it."""
    from ..errors import EvaluationError
    from ..judge.quality import load_quality

    if against is None or not Path(against).is_file():
        return None
    found = load_quality(Path(against))
    asked = questions.suite.names if questions.suite else ()
    if missing := set(asked) - {score.task for score in found.scores}:
        raise EvaluationError(
            f"{against}: holds no score in {', '.join(sorted(missing))}. "
            "Evaluate the original by the same tasks."
        )
    return found

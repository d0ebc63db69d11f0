"""The commands that judge models: quality, all of it side by side, speed."""

from pathlib import Path
from typing import Annotated

import typer

from .flags import (
    AllowLinks,
    Device,
    Json,
    Revision,
    Source,
    TrustCode,
    chosen_device,
    flag,
)
from .questions import (
    ANSWER_TOKENS,
    FAILED,
    FailIf,
    MaxTokens,
    NewTokens,
    PromptsFrom,
    TaskDir,
    Tasks,
    Texts,
    VllmFlags,
    Window,
    find_questions,
    find_result,
    split_flags,
    with_prompts,
)

NEW_TOKENS, REPEATS = 32, 5


def evaluate(
    source: Source,
    text: Texts = None,
    revision: Revision = None,
    trust_remote_code: TrustCode = False,
    allow_links: AllowLinks = False,
    sequence_length: Window = 2048,
    max_tokens: MaxTokens = None,
    device: Device = "auto",
    tasks: Tasks = None,
    task_dir: TaskDir = None,
    generate: PromptsFrom = None,
    new_tokens: NewTokens = ANSWER_TOKENS,
    server: Annotated[
        str | None,
        flag("URL of a running server to ask; otherwise one is started."),
    ] = None,
    model: Annotated[
        str | None, flag("Name of the model on the server, if it serves several.")
    ] = None,
    against: Annotated[
        str | None,
        flag("Original checkpoint, or its `eval --json` output: compares with it."),
    ] = None,
    fail_if: FailIf = None,
    card: Annotated[
        bool, flag("Write the scores into the checkpoint's model card.", "--card")
    ] = False,
    vllm_flags: VllmFlags = None,
    as_json: Json = False,
) -> None:
    """Evaluate a model: held-out perplexity, lm-eval tasks, answers to prompts.

    Perplexity comes from the streaming forward; the model need not fit in memory.
    Tasks and prompts are put to a vLLM server, which is started unless --server names
    one. `zero-shot` are UNIFIED's eight tasks, `paper` adds GSM8K. Of answers it counts
    repetition, loops, length and how many end by themselves. --against adds recovery
    (scores in per cent of the original's, with standard errors) and how far the answers
    are from the original's.

    Example: `vllm-moe-prune eval OUT --text heldout.txt`

    Example: `vllm-moe-prune eval OUT --tasks paper --against ORIGINAL`

    Example: `vllm-moe-prune eval OUT --tasks demo --task-dir examples/tasks --json`

    Example: `vllm-moe-prune eval OUT --generate prompts.txt --fail-if "loops>0.02"`

    On several processes: `torchrun --nproc-per-node 4 -m vllm_moe_prune eval ...`, for
    --text.
    """
    from ..checkpoint.source import open_checkpoint
    from ..errors import EvaluationError, RanksError
    from ..judge.gate import check_measured, failures, parse_conditions
    from ..judge.quality import Subject, judge
    from ..judge.scored_card import check_card, write_scores
    from ..judge.tasks import find_endpoint
    from ..ranks.group import joined
    from ..ranks.launched import launched
    from .output.draw import watching
    from .output.show_judged import show_quality

    if not (text or tasks or generate):
        raise EvaluationError(
            "say what by: --text heldout.txt, --tasks paper, --generate prompts.txt."
        )
    if server is not None and not (tasks or generate):
        raise EvaluationError(
            "--server is asked for tasks and answers only; add --tasks or --generate."
        )
    if model is not None and server is None:
        raise EvaluationError("--model names one of a server's models; add --server.")
    if launched() and (tasks or generate):
        raise RanksError(
            "tasks and answers are asked of one server; torchrun is for --text alone."
        )
    conditions = parse_conditions(fail_if or ())
    check_measured(
        conditions,
        answers=generate is not None,
        texts=bool(text),
        tasks=bool(tasks),
        original=against is not None,
    )
    with joined() as ranks:
        quiet = as_json or ranks.rank > 0
        questions = find_questions(
            text,
            tasks,
            task_dir,
            sequence_length,
            max_tokens,
            device,
            vllm_flags,
            as_json,
        )
        checkpoint = open_checkpoint(
            source, revision, trust_code=trust_remote_code, allow_links=allow_links
        )
        if card:
            check_card(checkpoint)
        # Asked before the perplexity, which may take hours.
        endpoint = find_endpoint(server, model) if server is not None else None
        subject = Subject(checkpoint, source, revision, endpoint)
        # A result that lacks a task is refused before anything is measured.
        known = find_result(against, questions, generate)
        original = None
        if against is not None and known is None:
            original = Subject(
                open_checkpoint(
                    against, trust_code=trust_remote_code, allow_links=allow_links
                ),
                against,
            )
        questions = with_prompts(questions, checkpoint, generate, new_tokens)
        # The original first: its answers are what others are compared with.
        if original is not None:
            with watching(quiet) as report:
                known = judge(original, questions, report, ranks=ranks)
        with watching(quiet) as report:
            quality = judge(subject, questions, report, known, ranks)
        if ranks.rank:
            return
        if card:
            write_scores(checkpoint, quality, known)
        failed = failures(conditions, quality, known)
        show_quality(quality, known, failed, as_json)
    if failed:
        raise typer.Exit(FAILED)


def compare(
    sources: Annotated[
        list[str],
        typer.Argument(help="Checkpoint folders or Hub ids; the original first."),
    ],
    text: Texts = None,
    sequence_length: Window = 2048,
    max_tokens: MaxTokens = None,
    trust_remote_code: TrustCode = False,
    device: Device = "auto",
    tasks: Tasks = None,
    task_dir: TaskDir = None,
    generate: PromptsFrom = None,
    new_tokens: NewTokens = ANSWER_TOKENS,
    fail_if: FailIf = None,
    speed: Annotated[
        bool, flag("Serve and time each checkpoint, as `speed` does.", "--speed")
    ] = False,
    speed_from: Annotated[
        Path | None, flag("Read speeds from the output of `speed --json`.")
    ] = None,
    vllm_flags: VllmFlags = None,
    allow_links: AllowLinks = False,
    as_json: Json = False,
) -> None:
    """Compare checkpoints: size, FLOPs, quality and speed in one table.

    Sizes and FLOPs come from headers. Quality and speed are measured on request.
    Values in brackets, recovery and agreement are relative to the first checkpoint;
    --fail-if judges the others.

    Example: `vllm-moe-prune compare CKPT OUT --text heldout.txt`

    Example: `vllm-moe-prune compare CKPT OUT1 OUT2 --tasks paper --speed --json`
    """
    from ..checkpoint.source import open_checkpoint
    from ..errors import EvaluationError
    from ..judge.compare import Column, find_speeds, size_of
    from ..judge.gate import check_measured, failures, parse_conditions
    from ..judge.quality import Subject, judge
    from ..judge.speed import measure_speed, sweep_for
    from .output.draw import watching
    from .output.show_compared import show_compared

    if len(sources) < 2:
        raise EvaluationError("compare needs two checkpoints, the original first.")
    if speed and speed_from is not None:
        raise EvaluationError("give --speed or --speed-from, not both.")
    conditions = parse_conditions(fail_if or ())
    check_measured(
        conditions,
        answers=generate is not None,
        texts=bool(text),
        tasks=bool(tasks),
        original=True,
    )
    questions = find_questions(
        text,
        tasks,
        task_dir,
        sequence_length,
        max_tokens,
        device,
        vllm_flags,
        as_json,
    )
    subjects = [
        Subject(
            open_checkpoint(
                source, trust_code=trust_remote_code, allow_links=allow_links
            ),
            source,
        )
        for source in sources
    ]
    # By folder name, as `speed --json` knows no paths.
    known = find_speeds(speed_from, subjects) if speed_from is not None else {}
    sweep = None
    if speed:
        opened = [one.checkpoint for one in subjects]
        # One sweep for all, of contexts that every model takes.
        sweep = sweep_for(opened, None, NEW_TOKENS, REPEATS, questions.flags)
    questions = with_prompts(questions, subjects[0].checkpoint, generate, new_tokens)
    columns: list[Column] = []
    for one in subjects:
        first = columns[0].quality if columns else None
        with watching(as_json) as report:
            quality = judge(one, questions, report, first)
        timed = measure_speed(one, sweep) if sweep else known.get(one.name)
        columns.append(Column(one.source, size_of(one.checkpoint), quality, timed))
    failed = [
        failure
        for column in columns[1:]
        for failure in failures(conditions, column.quality, columns[0].quality)
    ]
    show_compared(columns, failed, as_json)
    if failed:
        raise typer.Exit(FAILED)


def speed(
    source: Annotated[
        str, typer.Argument(help="Original checkpoint: folder or Hub id.")
    ],
    pruned: Annotated[
        list[str],
        typer.Argument(help="Checkpoints cut from it; one trimmed and slimmed."),
    ],
    calibration: Annotated[
        list[str] | None,
        flag(
            "Calibration text, if cutting the slim-only checkpoint needs it.",
            "--calibration",
        ),
    ] = None,
    work: Annotated[
        Path | None,
        flag("Folder for the checkpoints it cuts. Default: a temporary one."),
    ] = None,
    contexts: Annotated[
        str | None,
        flag(
            "Prompt lengths, comma-separated. Default: 128,512,1024,2048, as far as "
            "the model's context allows."
        ),
    ] = None,
    new_tokens: Annotated[
        int, typer.Option(min=2, help="Tokens to generate after each prompt.")
    ] = NEW_TOKENS,
    repeats: Annotated[
        int, typer.Option(min=1, help="Requests per prompt length.")
    ] = REPEATS,
    trust_remote_code: TrustCode = False,
    device: Device = "auto",
    plot: Annotated[
        Path | None, flag("Plot speed over context length into this .png or .svg file.")
    ] = None,
    vllm_flags: VllmFlags = None,
    allow_links: AllowLinks = False,
    as_json: Json = False,
) -> None:
    """Time baseline, trim-only, slim-only and both, in turn in one runtime.

    Each checkpoint's role is read from its metadata. Missing trim-only and slim-only
    checkpoints are cut from the plan of the one that is both. `vllm bench serve` takes
    the times: one request at a time, prefill and decode separately.

    Example: `vllm-moe-prune speed CKPT OUT --calibration TEXT --json > speed.json`

    Example: `vllm-moe-prune speed CKPT OUT --vllm-flags "--tensor-parallel-size 2"`
    """
    import tempfile

    from ..checkpoint.output_path import check_file
    from ..checkpoint.source import open_checkpoint
    from ..judge.quality import Subject
    from ..judge.speed import parse_contexts
    from ..judge.trim_slim_speed import (
        make_missing,
        measure_rows,
        plot_rows,
        prepare,
    )
    from ..pipeline import RunOptions
    from ..recipes.calibration import parse_texts
    from ..tune.front import check_plot
    from .output.draw import err, watching
    from .output.show_compared import show_speed

    device = chosen_device(device)
    opened = [
        Subject(
            open_checkpoint(one, trust_code=trust_remote_code, allow_links=allow_links),
            one,
        )
        for one in (source, *pruned)
    ]
    if plot is not None:
        check_plot(plot)
        check_file(plot, opened[0].checkpoint.folder)
    # Roles, contexts and texts are checked before anything is cut.
    timing = prepare(
        opened[0],
        opened[1:],
        contexts=parse_contexts(contexts) if contexts is not None else None,
        new_tokens=new_tokens,
        repeats=repeats,
        flags=split_flags(vllm_flags),
        calibration=parse_texts(calibration, "--calibration") if calibration else None,
    )
    # Checkpoints that are cut here are served from it, so it stays until the end.
    with tempfile.TemporaryDirectory(prefix="moe-prune-speed-") as temporary:
        with watching(as_json) as report:
            options = RunOptions(device=device, report=report)
            roles = make_missing(timing, work or Path(temporary), options)
        found = measure_rows(
            roles,
            timing.sweep,
            lambda line: None if as_json else err.print(line, style="dim"),
        )
    if plot is not None:
        plot_rows(found, plot)
    show_speed(found, as_json)

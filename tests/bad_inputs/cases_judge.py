"""Judging that cannot be done: no such task, server, result or role."""

import json
import shutil
from pathlib import Path

from .case import Case, Spoil, both, holding, in_json, with_keys

TASK = """\
task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: choices
doc_to_target: gold
"""
QUESTION = '{"context": "a", "choices": ["b", "c"], "gold": 0}\n'
MINE = "eval ckpt --json --tasks mine --task-dir ."
SPEED = "speed ckpt out --json"
WINDOW = "--sequence-length 32 --max-tokens 64 --json"
SAVED_TEXT = {"source": "text.txt", "tokens": 64, "nll": 300.0}
SAVED_TASK = {"task": "t", "metric": "acc", "value": 0.5, "stderr": 0.1, "samples": 9}
RATES = {"median": 1.0, "low": 2.0, "high": 3.0}
DISORDERED = {
    "model": "ckpt",
    "contexts": [{"context": 128, "prefill": RATES, "decode": RATES}],
    "peak_bytes": 1,
}
RESULT = '{"model": "m", "results": [], "tasks": []}'


def with_task(content: str = TASK) -> Spoil:
    """A task file, and a cache of its own for what ``datasets`` reads."""
    return both(holding("mine.yaml", content), holding("questions.jsonl", QUESTION))


def another_family(folder: Path) -> None:
    """An output that says it is of another family."""
    shutil.copytree(folder / "ckpt", folder / "other")
    in_json("other/config.json", lambda config: config.update(rms_norm_eps=0.5))(folder)


CASES = [
    Case("eval: by nothing", "eval ckpt", ("--text", "--tasks")),
    Case("eval: no such text", "eval ckpt --text no.txt", ("no.txt", "no such")),
    Case(
        "eval: a server for perplexity",
        "eval ckpt --text text.txt --server http://127.0.0.1:9",
        ("--server", "--tasks"),
    ),
    Case(
        "eval: a model of no server",
        "eval ckpt --text text.txt --model full",
        ("--model", "--server"),
    ),
    Case(
        "eval: a folder for no tasks",
        "eval ckpt --text text.txt --task-dir .",
        ("--task-dir", "--tasks"),
    ),
    Case("eval: no such prompts", "eval ckpt --generate no.txt", ("no.txt", "no such")),
    Case(
        "eval: prompts that are none",
        "eval ckpt --generate prompts.jsonl",
        ("prompts.jsonl: line 1", "only answer", "'prompt'"),
        holding("prompts.jsonl", '{"answer": "4"}'),
    ),
    Case(
        "eval: no prompt",
        "eval ckpt --generate prompts.txt",
        ("prompts.txt", "is empty"),
        holding("prompts.txt", "\n \n"),
    ),
    Case(
        "eval: answers against a result",
        "eval ckpt --generate text.txt --against result.json",
        ("result.json", "token by token", "checkpoint"),
        holding("result.json", RESULT),
    ),
    Case(
        "eval: an unknown condition",
        "eval ckpt --text text.txt --fail-if lops>0.02",
        ("'lops'", "Names: loops, repetition"),
    ),
    Case(
        "eval: a condition that is none",
        "eval ckpt --text text.txt --fail-if loops",
        ("'loops'", "loops>0.02"),
    ),
    Case(
        "eval: a condition on what is not measured",
        "eval ckpt --text text.txt --fail-if 'kl>1'",
        ("kl", "--generate and --against"),
    ),
    Case(
        "compare: a condition on what is not measured",
        "compare ckpt out --fail-if 'perplexity_ratio>1'",
        ("perplexity_ratio", "without --text."),
    ),
    Case(
        "eval: a card without a place",
        "eval ckpt --text text.txt --card",
        ("README.md", "no place for scores"),
    ),
    Case("eval: an empty name", "eval ckpt --tasks mine,", ("--tasks", "empty")),
    Case(
        "eval: no folder of tasks",
        "eval ckpt --tasks mine --task-dir no",
        ("no: no such folder",),
    ),
    Case(
        "eval: a task that is no choice of lm-eval's",
        MINE,
        ("mine", "cannot be used"),
        with_task(TASK.replace("multiple_choice", "divination")),
    ),
    Case(
        "eval: data that no hub gives",
        MINE,
        ("mine", "data set cannot be had", "--task-dir"),
        with_task(TASK.replace("dataset_path: json", "dataset_path: nobody/nothing")),
    ),
    Case(
        "eval: nobody answers",
        f"{MINE} --server http://127.0.0.1:9",
        ("http://127.0.0.1:9", "no server answers", "vllm-moe-prune serve"),
        with_task(),
    ),
    Case(
        "eval: an address that is none",
        f"{MINE} --server somewhere",
        ("somewhere", "no server answers"),
        with_task(),
    ),
    Case(
        "eval: flags that do not end",
        f"""{MINE} --vllm-flags "--a 'b" """,
        ("--vllm-flags", "quotation"),
        with_task(),
    ),
    Case(
        "eval: a port of one's own",
        f"{MINE} --vllm-flags '--port 8000'",
        ("--port", "Leave it out"),
        with_task(),
    ),
    Case(
        "eval: against no such thing",
        "eval ckpt --text text.txt --against no.json",
        ("no.json", "no such folder"),
    ),
    Case(
        "eval: against junk",
        "eval ckpt --text text.txt --against result.json",
        ("result.json", "not valid JSON"),
        holding("result.json", "["),
    ),
    Case(
        "eval: against a score that is none",
        f"{MINE} --against result.json",
        ("result.json", "tasks.0.value", "eval --json"),
        both(
            with_task(),
            holding("result.json", RESULT),
            with_keys(
                "result.json",
                tasks=[
                    {
                        "task": "mine",
                        "metric": "acc",
                        "value": "good",
                        "stderr": None,
                        "samples": 1,
                    }
                ],
            ),
        ),
    ),
    Case(
        "eval: against other tasks",
        f"{MINE} --against result.json",
        ("result.json", "no score in mine"),
        both(with_task(), holding("result.json", RESULT)),
    ),
    Case("compare: one alone", "compare ckpt", ("two checkpoints",)),
    Case(
        "compare: speeds twice",
        "compare ckpt out --speed --speed-from speed.json",
        ("--speed-from", "not both"),
    ),
    *(
        Case(
            f"eval: saved {name}",
            f"eval ckpt --text text.txt {WINDOW} --against saved.json",
            ("saved.json", says),
            holding("saved.json", json.dumps({"model": "ckpt", **saved})),
        )
        for name, says, saved in (
            (
                "loss below zero",
                "results.0.nll",
                {"results": [SAVED_TEXT | {"nll": -1.0}]},
            ),
            (
                "loss without end",
                "results.0.nll",
                {"results": [SAVED_TEXT | {"nll": 1e300}]},
            ),
            (
                "no tokens",
                "results.0.tokens",
                {"results": [SAVED_TEXT | {"tokens": 0}]},
            ),
            ("score of 7", "tasks.0.value", {"tasks": [SAVED_TASK | {"value": 7.0}]}),
            ("error of 9", "tasks.0.stderr", {"tasks": [SAVED_TASK | {"stderr": 9.0}]}),
        )
    ),
    Case(
        "compare: speeds out of order",
        "compare ckpt out --speed-from speed.json",
        ("speed.json", "not in order"),
        holding("speed.json", json.dumps({"rows": [DISORDERED]})),
    ),
    Case(
        "compare: speeds of nobody",
        "compare ckpt out --speed-from speed.json",
        ("speed.json", "no speed of ckpt, out"),
        holding("speed.json", '{"rows": []}'),
    ),
    Case(
        "compare: speeds that are none",
        "compare ckpt out --speed-from speed.json",
        ("speed.json", "rows", "speed --json"),
        holding("speed.json", '{"rows": 3}'),
    ),
    Case(
        "compare: names that are equal",
        "compare ckpt ckpt --speed-from speed.json",
        ("speed.json", "not all different"),
        holding("speed.json", '{"rows": []}'),
    ),
    Case("speed: of nothing pruned", "speed ckpt ckpt", ("ckpt: is baseline",)),
    Case("speed: one kind twice", "speed ckpt out uneven", ("uneven: is both",)),
    Case("speed: junk contexts", f"{SPEED} --contexts much", ("'much'", "128,512")),
    Case(
        "speed: contexts beyond the model",
        f"{SPEED} --contexts 500",
        ("500 with 32 new tokens", "2 to 480"),
    ),
    Case(
        "speed: no text to slim by",
        SPEED,
        ("slims by wanda", "text.txt", "--calibration"),
    ),
    Case(
        "speed: of another model",
        "speed other out --json",
        ("out: was not made from other", "checkpoints too"),
        another_family,
    ),
    Case(
        "speed: a picture of a kind unknown",
        f"{SPEED} --plot a.doc",
        ("a.doc", ".png"),
    ),
    Case("speed: no such device", f"{SPEED} --device tpu", ("'tpu'", "cpu")),
    Case(
        "speed: a port of one's own",
        f"{SPEED} --calibration text.txt --vllm-flags '--port 1'",
        ("--port", "Leave it out"),
    ),
]

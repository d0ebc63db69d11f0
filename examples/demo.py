"""The main job from end to end on the demo model: prune, judge, serve, talk.

`make demo` runs it. Every step is the command that a user would type. The original and
what each recipe makes of it are served by real `vllm serve` processes and asked through
the `openai` client; one table puts them side by side.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import corpus
from demo_server import Served, serve
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
WORK = HERE.parent / "demo-output"
TOOL = [sys.executable, "-m", "vllm_moe_prune"]
RECIPES = ("default", "cpu50", "stun40-paper")
#: Sums that the model has never seen; the first is the question that is shown.
SUMS = 200
SENTENCE = "Return a list of all the"
ROUNDS = 3

console = Console(soft_wrap=True)


def main() -> None:
    """Run the demo for one family."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", nargs="?", default="mixtral")
    parser.add_argument("--recipe", action="append", help="instead of the usual three")
    options = parser.parse_args()
    # An interrupted demo must not leave servers behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    original = HERE / f"demo-{options.family}"
    if not original.is_dir():
        known = sorted(path.name.removeprefix("demo-") for path in HERE.glob("demo-*/"))
        sys.exit(f"demo: no family {options.family!r}; there are {', '.join(known)}")
    WORK.mkdir(exist_ok=True)
    began = time.monotonic()
    folders = {"original": original}
    cores = sorted(os.sched_getaffinity(0))
    with ExitStack() as servers:
        console.rule("1. Prune; each model is served as soon as it is there")
        served = {"original": servers.enter_context(serve(original, cores[0], WORK))}
        for number, recipe in enumerate(options.recipe or RECIPES, 1):
            folders[recipe] = prune(original, options.family, recipe)
            core = cores[number % len(cores)]
            served[recipe] = servers.enter_context(serve(folders[recipe], core, WORK))

        console.rule("2. Judge")
        rows = judge(folders)

        console.rule("3. Ask all servers the same")
        for one in served.values():
            one.wait_until_ready()
        answers = ask(served, rows)

    console.rule("4. Side by side")
    table = Table("", *folders, title=f"demo-{options.family}")
    for name, cells in rows.items():
        table.add_row(name, *cells)
    console.print(table)
    for prompt, each in answers.items():
        console.print(f"\n{prompt}", style="bold", markup=False)
        for name, answer in zip(folders, each, strict=True):
            shown = " ".join(answer.split())
            console.print(f"  {name:<13} {shown}", markup=False, highlight=False)

    console.rule("5. What was removed, and why")
    pruned = [folder for folder in folders.values() if folder != original]
    run("report", str(pruned[0]))
    console.print(f"All of it took {time.monotonic() - began:.0f} s.")


def run(*arguments: str) -> str:
    """Run the tool as a user would, showing the command."""
    shown = " ".join(arguments).replace(f"{HERE.parent}/", "")
    console.print(f"$ vllm-moe-prune {shown}", style="bold", markup=False)
    capture = "--json" in arguments
    done = subprocess.run(
        [*TOOL, *arguments],
        check=True,
        text=True,
        stdout=subprocess.PIPE if capture else None,
    )
    return done.stdout if capture else ""


def prune(original: Path, family: str, recipe: str) -> Path:
    """A pruned copy of the model."""
    out = WORK / f"{family}-{recipe}"
    run(
        *("run", str(original), str(out), "--recipe", recipe),
        *("--calibration", str(HERE / "calibration.txt")),
        *("--samples", "96", "--sequence-length", "256", "--overwrite"),
    )
    return out


def judge(folders: dict[str, Path]) -> dict[str, list[str]]:
    """Sizes, experts and perplexity per domain: a row for each, a cell per model."""
    texts = sorted((HERE / "heldout").glob("*.txt"))
    flags = [flag for text in texts for flag in ("--text", str(text))]
    flags += ["--sequence-length", "256", "--max-tokens", "4096", "--json"]
    seen = [json.loads(run("inspect", str(one), "--json")) for one in folders.values()]
    compared = json.loads(run("compare", *map(str, folders.values()), *flags))
    columns = compared["checkpoints"]
    rows = {
        "experts per layer": [
            " ".join(map(str, one["experts_per_layer"])) for one in seen
        ],
        "weight files, bytes": [f"{one['file_bytes']:,}" for one in columns],
    }
    for at, text in enumerate(texts):
        found = [one["results"][at]["perplexity"] for one in columns]
        rows[f"perplexity, {text.stem}"] = [f"{one:.2f}" for one in found]
    return rows


def ask(served: dict[str, Served], rows: dict[str, list[str]]) -> dict[str, list[str]]:
    """Put the same questions to all servers; adds rows, returns answers per prompt."""
    pairs = random.Random(0).sample(corpus.sums()["heldout"], SUMS)
    questions = [f"What is {a} + {b}?" for a, b in pairs]
    expected = [f"{a} + {b} = {a + b}." for a, b in pairs]
    rows["in the server, bytes"] = [
        f"{one.weight_bytes():,}" for one in served.values()
    ]
    rows[f"sums right, of {SUMS}"] = []
    for one in served.values():
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(one.chat, questions))
        # The working comes first: "7 + 8 = 15, 2 + 5 + 1 = 8: 27 + 58 = 85."
        right = sum(map(str.endswith, found, expected))
        rows[f"sums right, of {SUMS}"].append(str(right))
    # In turn, so that a busy moment of the machine meets all of them.
    rates = [[one.decode_rate() for one in served.values()] for _ in range(ROUNDS)]
    rows["tokens/s, one request"] = [
        f"{median(each):.0f}" for each in zip(*rates, strict=True)
    ]
    return {
        questions[0]: [one.chat(questions[0]) for one in served.values()],
        f"{SENTENCE} …": [one.complete(SENTENCE) for one in served.values()],
    }


if __name__ == "__main__":
    main()

"""Everything that a GPU owes this project, in 8 minutes: make gpu-check.

    python -m bench.gpu.check [--out FOLDER] [--seconds 480] [--small] [--pretend]

It needs torch and Triton, no vLLM and no network; what needs more and finds it missing
is left out, and said to be. The most valuable comes first, each step in a process with
a limit of its own; none is begun that could not end. FOLDER has what each step found,
and gpu-check.json the verdicts so far, after every step: a run that is killed has told
all it knew. Ends with 1 if a step failed or was not done in its time.

--pretend runs every step on a device that is not there (tests/pretended), with tiny
sizes: to try the check itself, on a CPU.
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PRUNING = ("transformers", "safetensors", "pydantic", "scipy", "tokenizers")
SANITIZE = ("compute-sanitizer", "--error-exitcode", "1", "--tool")
KEPT = 5
"""Seconds before its limit at which a step that measures begins nothing more."""


@dataclass(frozen=True)
class Step:
    """One process."""

    name: str
    seconds: float
    """After which it is ended."""
    module: str
    arguments: tuple[str, ...] = ()
    under: tuple[str, ...] = ()
    """The command that starts it, if not Python."""
    needs: tuple[str, ...] = ()
    """Programs and modules."""
    timed: bool = False
    """Whether it watches the time by itself."""


PLANES = "bench.gpu.planes.measure"
STEPS = (
    Step("machine", 20, "bench.gpu.machine"),
    Step("ceilings", 20, "bench.gpu.ceilings"),
    Step("right", 60, "bench.gpu.right"),
    Step(
        *("races", 35, "bench.gpu.right", ("--few",), (*SANITIZE, "racecheck")),
        needs=SANITIZE[:1],
    ),
    Step(
        *("memory", 30, "bench.gpu.right", ("--few",), (*SANITIZE, "memcheck")),
        needs=SANITIZE[:1],
    ),
    Step("speed", 115, "bench.gpu.moe", timed=True),
    Step("prune", 55, "bench.gpu.prune", needs=PRUNING, timed=True),
    Step("methods", 35, "bench.gpu.slim", timed=True),
    Step("planes", 45, PLANES, needs=("nvcc",)),
    Step(
        *("planes-races", 30, PLANES, ("--few",), (*SANITIZE, "racecheck")),
        needs=("nvcc", *SANITIZE[:1]),
    ),
    Step("tiles", 35, "bench.gpu.tiles", timed=True),
)
Found = dict[str, Any]


def missing(names: tuple[str, ...]) -> list[str]:
    """Programs that are not on the path and modules that cannot be imported."""
    return [
        name
        for name in names
        if shutil.which(name) is None and importlib.util.find_spec(name) is None
    ]


def command(step: Step, json_file: Path, options: argparse.Namespace) -> list[str]:
    """What to start."""
    begin = [*step.under, sys.executable, "-m"]
    if options.pretend:
        begin.append("tests.pretended.run")
    said = [step.module, "--json", str(json_file), *step.arguments]
    if options.small or options.pretend:
        said.append("--small")
    if step.timed:
        said += ["--seconds", str(max(0, step.seconds - KEPT))]
    return begin + said


def ended(process: "subprocess.Popen[bytes]", seconds: float) -> int | None:
    """Its exit status; None if it had to be ended, with all that it had started."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def run(step: Step, left: float, options: argparse.Namespace) -> Found:
    """Do a step, unless something is missing or there is no time for it."""
    found: Found = {"step": step.name, "seconds": 0.0}
    if lacking := missing(step.needs):
        return {**found, "verdict": f"left out: no {', '.join(lacking)}"}
    if left < step.seconds:
        said = f"{left:.0f} s left, {step.seconds:.0f} needed"
        return {**found, "verdict": f"left out: {said}"}
    json_file, log = options.out / f"{step.name}.json", options.out / f"{step.name}.log"
    json_file.unlink(missing_ok=True)
    start = time.monotonic()
    with log.open("wb") as into:
        process = subprocess.Popen(
            command(step, json_file, options),
            cwd=ROOT,
            env=environment(options.out),
            stdout=into,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        code = ended(process, step.seconds)
    found["seconds"] = round(time.monotonic() - start, 1)
    found["verdict"] = "ok"
    if code is None:
        found["verdict"] = f"NOT DONE in {step.seconds:.0f} s"
    elif code != 0:
        found["verdict"] = f"FAILED ({code})"
        found["end"] = log.read_text("utf-8", "replace").splitlines()[-15:]
    if json_file.exists():
        found["found"] = json.loads(json_file.read_text("utf-8"))
    return found


def environment(out: Path) -> dict[str, str]:
    """For the steps: this checkout, also where it is not installed."""
    about = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    metadata = out / "site" / f"vllm_moe_prune-{about['version']}.dist-info/METADATA"
    metadata.parent.mkdir(parents=True, exist_ok=True)
    lines = ("Metadata-Version: 2.1", f"Name: {about['name']}")
    metadata.write_text("\n".join([*lines, f"Version: {about['version']}\n"]), "utf-8")
    paths = [str(ROOT), os.environ.get("PYTHONPATH", ""), str(out / "site")]
    path = os.pathsep.join(filter(None, paths))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def options_of(words: list[str] | None = None) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu-check"))
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--pretend", action="store_true")
    options = parser.parse_args(words)
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def main() -> None:
    """Run the steps in their order."""
    options = options_of()
    began = time.monotonic()
    if not options.pretend:
        ask = "import sys, torch; sys.exit(not torch.cuda.is_available())"
        if subprocess.run([sys.executable, "-c", ask], check=False).returncode:
            sys.exit(
                "gpu-check: no CUDA device that torch can use; nothing was checked"
            )
    found = []
    for step in STEPS:
        found.append(run(step, options.seconds - (time.monotonic() - began), options))
        print(f"{step.name:14}{found[-1]['seconds']:7.1f} s  {found[-1]['verdict']}")
        sys.stdout.flush()
        about = {"pretended": options.pretend, "steps": found}
        text = json.dumps(about, indent=1) + "\n"
        (options.out / "gpu-check.json").write_text(text, "utf-8")
    sys.exit(any(one["verdict"].startswith(("FAILED", "NOT")) for one in found))


if __name__ == "__main__":
    main()

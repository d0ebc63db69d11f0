"""The command line as others rely on it: help, options, what goes to which stream."""

import importlib.machinery
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from tests.bad_inputs.case import Ran, run_cli
from tests.tiny import tiny_checkpoint, tiny_text
from vllm_moe_prune.cli import app

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "cli_options.json"
SMALL = "--samples 2 --sequence-length 32 --heldout 2"
GROUP: Any = typer.main.get_command(app)
COMMANDS: dict[str, Any] = GROUP.commands
SERVERS = {"serve", "gateway"}
# What each command is run with here; servers do not end, and speed starts several.
RUNS = {
    "inspect": "inspect ckpt",
    "measure": f"measure ckpt -o new.safetensors --calibration text.txt {SMALL}",
    "plan": f"plan ckpt --stats stats.safetensors -o p.json --keep 3 {SMALL}",
    "cut": "cut ckpt --plan plan.json -o new --calibration text.txt",
    "convert": "convert out new --storage bitmask",
    "verify": "verify out --source ckpt",
    "run": f"run ckpt new --calibration text.txt --keep 3 {SMALL}",
    "recover": "recover out new --method lora --steps 2 --calibration text.txt "
    f"{SMALL}",
    "families": "families",
    "recipes": "recipes",
    "recommend": "recommend ckpt --speed 1.1",
    "tune": f"tune ckpt -o best.json --total 0.4 --calibration text.txt {SMALL}"
    " --recipe small.yaml",
    "report": "report out",
    "push": "push out owner/name --dry-run",
    "eval": "eval ckpt --text text.txt --sequence-length 64 --max-tokens 300",
    "compare": "compare ckpt out --text text.txt --max-tokens 300",
}
PROGRESS = re.compile(
    r"\w+: ((layer \d+ of \d+, )?[\d.]+ of [\d.]+ [GM]iB|step \d+ of \d+)"
    r"(, [\d.]+ ([GM]iB|steps)/s, .+ left)?(; best [\d., ]+)?\n"
    r"|\d+ candidates: at least .+ TFLOP of forwards .+\n  and .+ read; about .+\n"
)
COLOR = re.compile(r"\x1b\[[\d;]*\b(3|4|9|10)[0-9]\b[\d;]*m")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands need."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_checkpoint(folder / "ckpt", layers=2, experts=4, hidden=32, width=48)
    tiny_text(folder, 8000)
    tune = "{experts: [reap], budgets: [global], shares: [0.5], layers: []}"
    (folder / "small.yaml").write_text(f"tune: {tune}\n", "utf-8")
    return folder


@pytest.fixture
def folder(
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Path:
    """The current folder, with all that the commands need."""
    monkeypatch.chdir(files)
    if not (files / "out").exists():
        for command in (
            f"{RUNS['measure']} -o stats.safetensors",
            f"{RUNS['plan']} -o plan.json --calibration text.txt",
            f"{RUNS['run'].replace(' new', ' out')} --stats stats.safetensors",
        ):
            assert run_cli(command, monkeypatch, capsys).status == 0
    copy = tmp_path / "work"
    shutil.copytree(files, copy)
    monkeypatch.chdir(copy)
    return copy


def load_generator() -> ModuleType:
    """scripts/generate_docs as a module."""
    loader = importlib.machinery.SourceFileLoader(
        "generate_docs", str(ROOT / "scripts" / "generate_docs")
    )
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def options_of(command: Any) -> list[str]:
    """Arguments in capitals, options as they are written."""
    return [
        name if name.startswith("-") else name.upper()
        for parameter in command.params
        for name in (*parameter.opts, *parameter.secondary_opts)
    ]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_an_example_that_fits_its_options(name: str) -> None:
    about, example = load_generator().split_help(COMMANDS[name].help)
    assert about
    program, command, *arguments = shlex.split(example)
    assert (program, command) == ("vllm-moe-prune", name)
    given = [word for word in arguments if word.startswith("-")]
    if name != "serve":  # which hands other flags to vLLM
        assert set(given) <= set(options_of(COMMANDS[name]))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(name: str) -> None:
    silent = [item.name for item in COMMANDS[name].params if not item.help]
    assert silent == []


def test_the_command_reference_is_fresh() -> None:
    reference = ROOT / "docs" / "reference" / "cli.md"
    text = reference.read_text("utf-8")
    for name in COMMANDS:
        assert f"\n## {name}\n" in text
    assert load_generator().generated()[reference] == text, "run scripts/generate_docs"


def test_commands_and_options_are_the_reviewed_ones(update_golden: bool) -> None:
    found = {"": options_of(GROUP)}
    found |= {name: options_of(command) for name, command in COMMANDS.items()}
    if update_golden:
        GOLDEN.write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    assert found == json.loads(GOLDEN.read_text("utf-8")), (
        "the command line changed: if that is meant, pytest --update-golden"
    )


def test_every_command_can_print_json() -> None:
    options = {name: options_of(command) for name, command in COMMANDS.items()}
    without = [name for name in options if "--json" not in options[name]]
    assert set(without) == SERVERS
    assert all("--dry-run" in options[name] for name in SERVERS)
    assert RUNS.keys() == COMMANDS.keys() - SERVERS - {"speed"}


def test_help_and_version_load_nothing_heavy() -> None:
    calls = [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)]
    script = f"""
import json, sys
from vllm_moe_prune.cli import main
for arguments in {calls!r}:
    sys.argv = ["vllm-moe-prune", *arguments]
    try:
        main()
    except SystemExit as done:
        assert not done.code, (arguments, done.code)
heavy = ("torch", "transformers", "vllm", "numpy", "huggingface_hub")
print(json.dumps(sorted(set(heavy) & set(sys.modules))))
"""
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", RUNS)
def test_json_is_all_that_is_printed(
    name: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ran = run_cli(f"{RUNS[name]} --json", monkeypatch, capsys)
    assert ran.status == 0, ran
    assert isinstance(json.loads(ran.stdout), dict)
    assert ran.stderr == ""


@pytest.mark.parametrize("name", RUNS)
def test_results_go_to_stdout_and_progress_to_stderr(
    name: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ran = run_cli(RUNS[name], monkeypatch, capsys)
    assert ran.status == 0, ran
    assert ran.stdout
    assert PROGRESS.sub("", ran.stderr) == ""
    silent = {"families", "inspect", "plan", "recipes", "recommend", "report"}
    assert bool(ran.stderr) == (name not in silent)
    assert_plain(ran)


def assert_plain(ran: Ran) -> None:
    """No escape codes, and nothing wider than the narrowest usual terminal."""
    for text in (ran.stdout, ran.stderr):
        assert "\x1b" not in text
        assert max((len(line) for line in text.splitlines()), default=0) <= 80


def test_serve_only_prints_its_command_when_asked_to(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (folder / "bin").mkdir()
    (folder / "bin/vllm").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(folder / "bin"), prepend=os.pathsep)
    # Of vLLM's short options one has an h in it, which is not a call for help.
    for typed in ("ckpt --dry-run --port 8001 -dph", "--port 8001 -dph --dry-run ckpt"):
        own = "--cores vllm --no-preload"
        ran = run_cli(f"serve {own} {typed}", monkeypatch, capsys)
        assert ran.status == 0, ran
        program, *rest = shlex.split(ran.stdout)
        assert Path(program).name == "vllm"
        assert rest == ["serve", "ckpt", "--port", "8001", "-dph"]
        assert ran.stderr == ""
    for words in ("serve -h", "serve --help"):
        assert "MODEL" in run_cli(words, monkeypatch, capsys).stdout


@pytest.mark.parametrize("no_color", [False, True], ids=["color", "NO_COLOR"])
def test_a_terminal_gets_color_unless_it_asks_for_none(no_color: bool) -> None:
    script = """
import time
from vllm_moe_prune.cli.output.draw import facts, watching
from vllm_moe_prune.progress import Progress
with watching() as report:
    done, total = 12 << 30, 86 << 30
    at = Progress(stage="cut", layer=12, layers=32, bytes_done=done, bytes_total=total)
    report(at)
    time.sleep(0.3)
facts("Wrote out", [("size", "1.00 GiB")])
"""
    environment = {"COLUMNS": "80", "TERM": "xterm-256color"}
    if no_color:
        environment["NO_COLOR"] = "1"
    shown = on_a_terminal([sys.executable, "-c", script], environment)
    assert "layer 12 of 32, 12.00 of 86.00 GiB" in shown
    assert bool(COLOR.search(shown)) is not no_color
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown)
    assert max(len(line) for line in re.split(r"[\r\n]+", plain)) <= 80


def on_a_terminal(command: list[str], environment: dict[str, str]) -> str:
    """What a program writes to a terminal."""
    ours, theirs = os.openpty()
    inherited = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    with subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=inherited | environment,
    ) as process:
        os.close(theirs)
        shown = b""
        try:
            while data := os.read(ours, 65536):
                shown += data
        except OSError:  # how Linux says that the other side is gone
            pass
        assert process.wait() == 0, shown.decode()
    os.close(ours)
    return shown.decode()

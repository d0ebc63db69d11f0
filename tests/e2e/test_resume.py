"""Kill the cut anywhere, resume, and get the bytes of a run that nobody disturbed.

Most commands run in forked children of a server that has the imports done, which is
what ``python -m vllm_moe_prune`` does but for the seconds it takes to start.
"""

import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from tests.reference import (
    DROP_BLOCK,
    DROP_MOE,
    LayerCut,
    folder_bytes,
    read_json,
    write_plan,
)
from tests.tiny import tiny_checkpoint, tiny_text
from vllm_moe_prune.checkpoint.source import open_checkpoint

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "vllm_moe_prune.pipeline",
        "vllm_moe_prune.cli",
        "vllm_moe_prune.cli.output.draw",
        "vllm_moe_prune.cli.output.show",
        "transformers.models.mixtral.modeling_mixtral",
        "transformers.models.auto.tokenization_auto",
        "transformers.tokenization_mistral_common",
        __name__,
    ]
)
SHARD_SIZE = "60KB"
LAYERS, EXPERTS = 6, 6
HALF = LayerCut(
    keep=(5, 0, 3), clusters=((4, 5), (0, 1), (2, 3)), reconstruct=True, sparsity=0.5
)
CUTS = {
    0: HALF,
    1: LayerCut(keep=(1, 2, 4, 5), sparsity=0.4),
    2: DROP_MOE,
    3: LayerCut(sparsity=0.6),
    4: DROP_BLOCK,
    5: LayerCut(sparsity=0.3),
}
METHODS = ["none", "wanda"]
QUANTIZED = {"awq": {"method": "awq", "group_size": 32}}
# A file of the model that is larger than any shard.
LARGE = "vocabulary.txt"


def command_line(arguments: list[str], errors: Path, file_limit: int | None) -> None:
    """The command line, in a process of its own; what it writes goes to ``errors``."""
    from vllm_moe_prune.cli import main

    target = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(target, 1)
    os.dup2(target, 2)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.argv = ["vllm-moe-prune", *arguments]
    main()


@dataclass(frozen=True)
class World:
    """A model, plans for it, and what the plans lead to undisturbed."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def plan(self, method: str) -> Path:
        return self.folder / f"{method}.json"

    def finished(self, method: str) -> Path:
        """The output of an undisturbed cut."""
        out = self.folder / f"{method}-finished"
        if not out.exists():
            assert finish(self.start(method, out)) == 0, said(out)
        return out

    def cut_arguments(self, method: str, out: Path, *flags: str) -> list[str]:
        plan = ["--plan", str(self.plan(method)), "--shard-size", SHARD_SIZE]
        return ["cut", str(self.model), *plan, "-o", str(out), *flags]

    def run_arguments(self, out: Path, *flags: str) -> list[str]:
        recipe = ["--recipe", str(self.folder / "recipe.yaml")]
        sizes = ["--shard-size", SHARD_SIZE]
        return ["run", str(self.model), str(out), *recipe, *sizes, *flags]

    def start(
        self, method: str, out: Path, *flags: str, file_limit: int | None = None
    ) -> BaseProcess:
        """A cut that has just begun."""
        return start(self.cut_arguments(method, out, *flags), out, file_limit)


def start(
    arguments: list[str], out: Path, file_limit: int | None = None
) -> BaseProcess:
    process = SERVER.Process(
        target=command_line, args=(arguments, errors_of(out), file_limit)
    )
    process.start()
    return process


def errors_of(out: Path) -> Path:
    return out.with_name(out.name + "-errors.txt")


def said(out: Path) -> str:
    """What the last command for an output wrote."""
    return errors_of(out).read_text("utf-8")


def finish(process: BaseProcess) -> int:
    process.join(60)
    assert process.exitcode is not None, "hangs"
    return process.exitcode


def partial_of(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def journal_lines(out: Path) -> int:
    try:
        return (partial_of(out) / "journal.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def kill_when(process: BaseProcess, ready: Callable[[], bool]) -> int:
    """Kill a process as soon as something is so; returns its exit code."""
    while process.exitcode is None and not ready():
        time.sleep(0.0005)
    process.kill()
    return finish(process)


def killed_after(world: World, method: str, out: Path, lines: int) -> None:
    """Leave what a cut leaves that dies once its journal has so many lines."""
    process = world.start(method, out)
    code = kill_when(process, lambda: journal_lines(out) >= lines)
    assert code == -signal.SIGKILL, said(out)
    assert not out.exists()


def resume(world: World, method: str, out: Path, *flags: str) -> None:
    """Resume, and compare with an undisturbed run."""
    assert finish(world.start(method, out, "--resume", *flags)) == 0, said(out)
    assert folder_bytes(out) == folder_bytes(world.finished(method))
    assert not partial_of(out).exists()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("resume"))
    tiny_checkpoint(world.model, layers=LAYERS, experts=EXPERTS)
    (world.model / LARGE).write_bytes(bytes(300_000))
    text = tiny_text(world.folder, characters=20_000)
    calibration = {"source": str(text), "samples": 4, "sequence_length": 64}
    checkpoint = open_checkpoint(world.model)
    for method in [*METHODS, *QUANTIZED]:
        write_plan(
            world.plan(method),
            checkpoint,
            CUTS,
            slim=method if method in METHODS else "none",
            quantize=QUANTIZED.get(method),
            recipe={"calibration": calibration},
        )
    (world.folder / "recipe.yaml").write_text(
        "total_sparsity: 0.5\n"
        "experts: {drop: 0.3}\n"
        f"calibration: {{source: {text}, samples: 4, sequence_length: 64}}\n"
    )
    return world


@pytest.fixture(scope="module")
def half_done(world: World) -> Callable[[str, Path], Path]:
    """Gives each test a copy of what a cut left that was killed half-way."""

    def give(method: str, out: Path) -> Path:
        left = world.folder / f"{method}-killed"
        if not partial_of(left).exists():
            killed_after(world, method, left, lines=12)
        shutil.copytree(partial_of(left), partial_of(out))
        return partial_of(out)

    return give


GiveHalfDone = Callable[[str, Path], Path]


@pytest.mark.parametrize(
    ("method", "lines"),
    [
        *[("none", 1), ("none", 4), ("none", 16), ("wanda", 9)],
        pytest.param("awq", 9, marks=pytest.mark.slow),
    ],
)
def test_killed_cut_resumes_to_the_same_bytes(
    world: World, tmp_path: Path, method: str, lines: int
) -> None:
    out = tmp_path / "out"
    killed_after(world, method, out, lines)
    resume(world, method, out)


@pytest.mark.parametrize(
    "method", ["none", pytest.param("wanda", marks=pytest.mark.slow)]
)
def test_cut_killed_again_and_again_gets_there(
    world: World, tmp_path: Path, method: str
) -> None:
    """Whatever each run manages stays done, so that runs get shorter and shorter."""
    out, kills, more = tmp_path / "out", 0, 5
    while not out.exists():
        enough = journal_lines(out) + more
        process = world.start(method, out, "--resume")
        code = kill_when(process, lambda least=enough: journal_lines(out) >= least)  # type: ignore[misc]
        assert code in (0, -signal.SIGKILL), said(out)
        kills += code != 0
        assert kills < 20
    assert kills >= 3
    assert folder_bytes(out) == folder_bytes(world.finished(method))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("method", METHODS)
def test_cut_killed_at_any_moment_resumes(
    world: World, tmp_path: Path, method: str, seed: int
) -> None:
    out = tmp_path / "out"
    elapsed_s = read_json(world.finished(method) / "run.json")["elapsed_s"]
    process = world.start(method, out)
    time.sleep(random.Random(seed).uniform(0, 1.1 * elapsed_s))
    process.kill()
    # It may have died after its last step: what is there under the name is whole.
    if finish(process) == 0 or out.exists():
        assert folder_bytes(out) == folder_bytes(world.finished(method))
        return
    resume(world, method, out)


def test_an_unfinished_run_is_refused_without_resume(
    world: World, tmp_path: Path, half_done: GiveHalfDone
) -> None:
    out = tmp_path / "out"
    before = folder_bytes(half_done("none", out))
    assert finish(world.start("none", out)) == 2
    (line,) = said(out).splitlines()
    assert line.startswith(f"error: {partial_of(out)}: an unfinished run is there")
    assert "--resume" in line
    assert folder_bytes(partial_of(out)) == before


@pytest.mark.slow
def test_a_process_of_its_own_does_the_same(
    world: World, tmp_path: Path, half_done: GiveHalfDone
) -> None:
    out = tmp_path / "out"
    half_done("none", out)
    command = [sys.executable, "-m", "vllm_moe_prune"]
    command += world.cut_arguments("none", out, "--resume")
    resumed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert folder_bytes(out) == folder_bytes(world.finished("none"))


def test_resuming_does_not_write_finished_shards_again(
    world: World, tmp_path: Path, half_done: GiveHalfDone
) -> None:
    out = tmp_path / "out"
    partial = half_done("wanda", out)
    shards = partial.glob("result/*.safetensors")
    done = {path.name: path.stat().st_ino for path in shards}
    assert len(done) >= 4
    resume(world, "wanda", out)
    assert {name: (out / name).stat().st_ino for name in done} == done


def test_another_plan_is_refused_and_changes_nothing(
    world: World, tmp_path: Path, half_done: GiveHalfDone
) -> None:
    out = tmp_path / "out"
    partial = half_done("wanda", out)
    before = folder_bytes(partial)
    assert finish(world.start("none", out, "--resume")) == 2
    assert "another plan, input or calibration text" in said(out)
    assert folder_bytes(partial) == before
    resume(world, "wanda", out)


def test_another_shard_size_is_refused(
    world: World, tmp_path: Path, half_done: GiveHalfDone
) -> None:
    out = tmp_path / "out"
    half_done("none", out)
    flags = ("--resume", "--shard-size", "70KB")
    assert finish(world.start("none", out, *flags)) == 2
    resume(world, "none", out)


def cut_in_the_last_line(journal: Path) -> None:
    journal.write_bytes(journal.read_bytes()[:-7])


def cut_in_the_first_line(journal: Path) -> None:
    journal.write_bytes(journal.read_bytes()[:20])


def followed_by_nothing_readable(journal: Path) -> None:
    """What a file system may leave of a block when the power fails."""
    journal.write_bytes(journal.read_bytes() + b"\0\0\0\xff\xfe\n7\n")


@pytest.mark.parametrize(
    ("method", "spoil"),
    [
        ("none", cut_in_the_last_line),
        ("none", cut_in_the_first_line),
        ("none", followed_by_nothing_readable),
        ("wanda", cut_in_the_last_line),
    ],
)
def test_a_spoilt_journal_costs_time_only(
    world: World,
    tmp_path: Path,
    half_done: GiveHalfDone,
    method: str,
    spoil: Callable[[Path], None],
) -> None:
    out = tmp_path / "out"
    spoil(half_done(method, out) / "journal.jsonl")
    resume(world, method, out)


def with_a_bit_flipped(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)


def truncated(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("method", "spoil"),
    [
        ("none", with_a_bit_flipped),
        ("none", truncated),
        ("none", Path.unlink),
        ("wanda", with_a_bit_flipped),
    ],
)
def test_a_spoilt_shard_is_written_again(
    world: World,
    tmp_path: Path,
    half_done: GiveHalfDone,
    method: str,
    spoil: Callable[[Path], None],
) -> None:
    out = tmp_path / "out"
    partial = half_done(method, out)
    spoil(sorted(partial.glob("result/*.safetensors"))[1])
    resume(world, method, out)


def test_an_earlier_output_stays_until_the_new_one_is_complete(
    world: World, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(world.finished("none"), out)
    earlier = folder_bytes(out)
    process = world.start("wanda", out, "--overwrite")
    code = kill_when(process, lambda: journal_lines(out) >= 10)
    assert code == -signal.SIGKILL
    assert folder_bytes(out) == earlier
    assert finish(world.start("wanda", out, "--resume")) == 2
    assert "not empty" in said(out)
    assert folder_bytes(out) == earlier
    resume(world, "wanda", out, "--overwrite")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-errors.txt"]


def test_overwriting_forgets_an_unfinished_run(
    world: World, tmp_path: Path, half_done: GiveHalfDone
) -> None:
    out = tmp_path / "out"
    half_done("wanda", out)
    assert finish(world.start("none", out, "--overwrite")) == 0, said(out)
    assert folder_bytes(out) == folder_bytes(world.finished("none"))
    assert not partial_of(out).exists()


def largest(folder: Path, pattern: str) -> int:
    return max(path.stat().st_size for path in folder.glob(pattern))


@pytest.mark.parametrize(
    ("method", "full"),
    [("none", "shard"), ("none", "companion"), ("wanda", "hidden states")],
)
def test_a_full_disk_ends_in_one_line_and_can_be_resumed(
    world: World, tmp_path: Path, method: str, full: str
) -> None:
    """A limit on file sizes: the first file beyond it cannot be written."""
    out = tmp_path / "out"
    finished = world.finished(method)
    limit = {
        "shard": largest(finished, "*.safetensors") - 1,
        "companion": largest(finished, LARGE) - 1,
        "hidden states": 4 * 64 * 64 * 2,
    }[full]
    code = finish(world.start(method, out, file_limit=limit))
    message = said(out).strip().splitlines()[-1]
    assert code == 2, said(out)
    assert message.startswith("error: ")
    assert str(partial_of(out)) in message
    assert "Free" in message
    assert not out.exists()
    resume(world, method, out)


def measuring(out: Path) -> bool:
    """Whether a run has saved the state of its measurement."""
    return any(partial_of(out).glob("work/*.work/hidden-*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["measure", "cut"])
def test_killed_run_resumes_to_the_same_bytes(
    world: World, tmp_path: Path, stage: str
) -> None:
    expected = world.folder / "run-finished"
    if not expected.exists():
        assert finish(start(world.run_arguments(expected), expected)) == 0
    out = tmp_path / "out"
    process = start(world.run_arguments(out), out)
    ready = {
        "measure": lambda: measuring(out),
        "cut": lambda: journal_lines(partial_of(out) / "result") >= 6,
    }
    assert kill_when(process, ready[stage]) == -signal.SIGKILL, said(out)
    assert not out.exists()
    assert finish(start(world.run_arguments(out, "--resume"), out)) == 0, said(out)
    assert folder_bytes(out) == folder_bytes(expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-errors.txt"]

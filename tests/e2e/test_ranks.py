"""Under torchrun: any number of processes writes the bytes that one does."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests import several_ranks

# Many imports, and as many processes as ranks on two cores.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
ROOT = str(Path(__file__).parents[2])
PATHS = os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")])


def torchrun(*arguments: object) -> list[str]:
    """A command line of torchrun."""
    return [sys.executable, "-m", "torch.distributed.run", *map(str, arguments)]


def on_two_nodes(folder: Path, *arguments: object) -> list[tuple[int, str]]:
    """Three ranks: two on one node, one on another; status and errors of each.

    Nodes are agents with folders of their own, but for ``folder``.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    agents = []
    for node, ranks in enumerate((2, 1)):
        own = folder / f"node-{node}"
        own.mkdir()
        start = torchrun("--nnodes", 2, "--nproc-per-node", ranks, "--max-restarts", 0)
        start += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}"]
        start += ["--rdzv-id", "test", "--local-addr", "localhost"]
        where = {"HOME": str(own), "TMPDIR": str(own), "PYTHONPATH": PATHS}
        agents.append(
            subprocess.Popen(
                [*start, *map(str, arguments)],
                env=ONE_THREAD | where,
                cwd=own,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    said = [agent.communicate(timeout=240)[1] for agent in agents]
    return [(agent.returncode, line) for agent, line in zip(agents, said, strict=True)]


def files_of(folder: Path) -> dict[str, bytes]:
    """All but ``run.json``, which has times."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "run.json"
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and what one process makes of them."""
    folder = tmp_path_factory.mktemp("ranks")
    several_ranks.make_models(folder / "models")
    command = [sys.executable, "-m", "tests.several_ranks", "models", "1"]
    env = ONE_THREAD | {"PYTHONPATH": PATHS}
    subprocess.run(command, env=env, cwd=folder, check=True, timeout=240)
    return folder


def test_three_ranks_on_two_nodes_write_what_one_process_does(alone: Path) -> None:
    script = ("-m", "tests.several_ranks", alone / "models", alone / "3")
    for status, said in on_two_nodes(alone, *script):
        assert status == 0, said
    for name in several_ranks.RECIPES:
        one, three = files_of(alone / "1" / name), files_of(alone / "3" / name)
        assert one.keys() == three.keys()
        # Names alone: a difference of whole files would be too long to read.
        assert not [path for path, data in one.items() if three[path] != data], name
    assert {path.name for path in (alone / "3").iterdir()} == {*several_ranks.RECIPES}


def test_other_commands_refuse_torchrun(alone: Path) -> None:
    # As torchrun would start it; nobody is met.
    done = subprocess.run(
        [sys.executable, "-m", "vllm_moe_prune", "verify", str(alone / "1" / "wanda")],
        env=ONE_THREAD | {"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "error: verify runs in one process; torchrun is for" in done.stderr


DIFFERENT = """
import sys
from pathlib import Path
from vllm_moe_prune.errors import RanksError
from vllm_moe_prune.ranks.group import joined

with joined() as ranks:
    shared = Path(sys.argv[1]) / str(ranks.rank)
    shared.mkdir()
    for check in (
        lambda: ranks.agree(calibration_text=ranks.rank // 2),
        lambda: ranks.check_shared(shared),
    ):
        try:
            check()
        except RanksError as error:
            print(error)
"""


def test_ranks_with_another_input_or_folder_are_named(tmp_path: Path) -> None:
    script = tmp_path / "different.py"
    script.write_text(DIFFERENT)
    done = subprocess.run(
        torchrun("--standalone", "--nproc-per-node", 3, script, tmp_path),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("rank 2 has another calibration text than rank 0") == 3
    assert done.stdout.count("rank 1 does not see what rank 0 wrote") == 3
    assert not list(tmp_path.glob("*/.ranks-*"))

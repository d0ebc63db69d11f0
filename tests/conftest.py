"""Options and markers shared by all tests."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

VLLM_TIMEOUT_S = 600

# The models are tiny: more threads only wait for each other, and each worker has a
# core of its own. Set before torch is imported; child processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Python compiles what it imports once, whatever the shell says: each start of vLLM
# would do it again, 18 s long.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
if hasattr(os, "sched_getaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    # Not a default: workers inherit what this set in the process that starts them.
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(cores[worker % len(cores)])

# As on a processor without AMX, here and in all child processes.
if os.environ.get("WITHOUT_AMX") == "1":
    hiding = str(Path(__file__).with_name("without_amx"))
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if hiding not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [hiding, *paths]))
    assert "torch" not in sys.modules
    importlib.import_module("without_amx.sitecustomize")

# Examples are the same on every run, and a busy machine is not a failure.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="rewrite the files in tests/golden instead of comparing with them",
    )


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether to rewrite golden files instead of comparing with them."""
    return bool(request.config.getoption("--update-golden"))


@pytest.fixture(scope="module")
def engines_in_this_process() -> Iterator[None]:
    """vLLM engines without a process of their own, quiet and offline.

    Models are imported here to be asked what they are: the process of its own that vLLM
    starts for each, to keep CUDA out of this one, imports vLLM again, for 10 s.
    """
    from vllm.model_executor.models import registry

    from tests.engine import ENVIRONMENT

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_run_in_subprocess", lambda ask: ask())
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        yield


def put_long_files_first(items: list[pytest.Item]) -> None:
    """So that no worker is left alone with one at the end; order is kept otherwise."""
    weights: dict[Path, int] = {}
    for item in items:
        marks = {mark.name for mark in item.iter_markers()} & {"vllm", "slow"}
        weights[item.path] = max(weights.get(item.path, 0), len(marks))
    items.sort(key=lambda item: -weights[item.path])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    put_long_files_first(items)
    missing = pytest.mark.skip(reason="vLLM is not installed")
    has_vllm = importlib.util.find_spec("vllm") is not None
    for item in items:
        if item.get_closest_marker("vllm"):
            if not has_vllm:
                item.add_marker(missing)
            if not item.get_closest_marker("timeout"):
                item.add_marker(pytest.mark.timeout(VLLM_TIMEOUT_S))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch  # slow; only where a test needs to know

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")

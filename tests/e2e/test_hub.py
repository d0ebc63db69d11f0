"""Checkpoints of the Hub, from a stand-in for it on the loopback interface.

The stand-in speaks what huggingface_hub asks of the real one: information, listing and
files of a revision, with commit, ETag, length and ranges. Commands run in processes
of their own, several in each, since the endpoint is read when the library is imported.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.hub_session import Result, session
from tests.loopback import Handler, listening
from tests.reference import LayerCut, folder_bytes, read_json, write_plan
from tests.tiny import tiny_checkpoint
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.execute import execute_plan
from vllm_moe_prune.decide.cut_plan import load_plan

OLD, NEW = "0" * 39 + "1", "f" * 39 + "2"
# What the real Hub answers with for repositories one may not see.
REFUSED = {
    "acme/gated": (403, "GatedRepo", "Access is restricted. You are not authorized."),
    "acme/gated_too": (401, "GatedRepo", "Access is restricted. Please log in."),
    "acme/private": (401, "", "Invalid username or password."),
    "acme/absent": (404, "RepoNotFound", "Repository not found"),
    "acme/broken": (500, "", "Internal error"),
}


@dataclass
class Hub:
    """The stand-in: repositories of (revision -> commit -> folder), and a log."""

    folders: dict[str, dict[str, Path]]
    branches: dict[str, str]
    served: list[tuple[str, str, int]] = field(default_factory=list)
    """Method, path and bytes of every answer."""

    def bytes_served(self, repo: str) -> int:
        """How much a repository's files and information have cost so far."""
        return sum(size for _, path, size in self.served if f"/{repo}/" in path)

    def files_fetched(self, repo: str) -> set[str]:
        """Names of the files of which at least a part was fetched."""
        start = f"/{repo}/resolve/"
        return {
            path.removeprefix(start).partition("/")[2]
            for method, path, _ in self.served
            if method == "GET" and path.startswith(start)
        }


class Answer(Handler):
    """One request to the stand-in."""

    def __init__(self, hub: Hub, *arguments: Any) -> None:
        self.hub = hub
        super().__init__(*arguments)

    def do_GET(self) -> None:
        """A file, a part of one, or information."""
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/api/models/(\w+/[\w.-]+)/revision/([^/]+)", path):
            self._info(*match.groups())
        elif match := re.fullmatch(r"/api/models/(\w+/[\w.-]+)/tree/([^/]+)", path):
            self._tree(*match.groups())
        elif match := re.fullmatch(r"/(\w+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
            self._file(*match.groups())
        else:
            self._refuse(404, "EntryNotFound", f"no {path}")

    do_HEAD = do_GET

    def _commit(self, repo: str, revision: str) -> str | None:
        """The commit, after refusing what the real Hub refuses."""
        if repo in REFUSED:
            self._refuse(*REFUSED[repo])
        else:
            commit = self.hub.branches.get(revision, revision)
            if commit in self.hub.folders[repo]:
                return commit
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return None

    def _info(self, repo: str, revision: str) -> None:
        commit = self._commit(repo, revision)
        if commit is None:
            return
        self._send_json({"id": repo, "modelId": repo, "sha": commit, "siblings": []})

    def _tree(self, repo: str, revision: str) -> None:
        commit = self._commit(repo, revision)
        if commit is None:
            return
        files = sorted(self.hub.folders[repo][commit].iterdir())
        self._send_json(
            [
                {
                    "type": "file",
                    "path": path.name,
                    "size": path.stat().st_size,
                    "oid": hashlib.sha256(path.read_bytes()).hexdigest()[:40],
                }
                for path in files
            ]
        )

    def _file(self, repo: str, revision: str, name: str) -> None:
        commit = self._commit(repo, revision)
        if commit is None:
            return
        path = self.hub.folders[repo][commit] / name
        if not path.is_file():
            self._refuse(404, "EntryNotFound", "Entry not found", commit)
            return
        data = path.read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Repo-Commit": commit,
            "Accept-Ranges": "bytes",
        }
        status = 200
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(asked[1]), min(int(asked[2] or 10**12), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        self._send(status, data, headers)

    def _send_json(self, data: Any) -> None:
        self._send(200, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, message: str, commit: str = "") -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        headers |= {"X-Repo-Commit": commit}
        told = {name: value for name, value in headers.items() if value}
        self._send(status, json.dumps({"error": message}).encode(), told)

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.respond(status, data, headers)
        path = self.path.partition("?")[0]
        sent = 0 if self.command == "HEAD" else len(data)
        self.hub.served.append((self.command, path, sent))


@dataclass(frozen=True)
class World:
    """A stand-in with repositories, and a cache folder."""

    folder: Path
    hub: Hub
    endpoint: str

    @property
    def plan(self) -> Path:
        return self.folder / "plan.json"

    def cut(self, repo: str, out: str, *flags: str) -> list[str]:
        """Arguments of a cut of a repository."""
        plan = ["--plan", str(self.plan)]
        return ["cut", repo, *plan, "-o", str(self.folder / out), "--json", *flags]

    def session(
        self, commands: dict[str, list[str]], **environment: str
    ) -> dict[str, Result]:
        """Run commands in one fresh process that knows only the stand-in."""
        home = self.folder / "home"
        return session(commands, self.endpoint, home, **environment)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("hub")
    large = {"layers": 2, "hidden": 128, "width": 512}
    model = tiny_checkpoint(folder / "model", **large)
    (model / "LICENSE").write_text("Apache License")
    (model / "pytorch_model.bin").write_bytes(b"a second copy")
    newer = tiny_checkpoint(folder / "newer", shards=1, seed=1, **large)
    checkpoint = open_checkpoint(model)
    plan = write_plan(folder / "plan.json", checkpoint, {0: LayerCut(keep=(0, 2, 5))})
    execute_plan(checkpoint, load_plan(plan), folder / "pruned")
    (folder / "pickles").mkdir()
    (folder / "pickles" / "config.json").write_bytes(
        (model / "config.json").read_bytes()
    )
    (folder / "pickles" / "pytorch_model.bin").write_bytes(b"pickled")
    (folder / "dataset").mkdir()
    (folder / "dataset" / "data.csv").write_text("1,2")
    both = {OLD: model, NEW: newer}
    hub = Hub(
        {
            "acme/looked_at": both,
            "acme/model": both,
            "acme/pruned": {OLD: folder / "pruned"},
            "acme/pickles": {OLD: folder / "pickles"},
            "acme/dataset": {OLD: folder / "dataset"},
        },
        {"main": OLD, "v2": NEW},
    )
    with listening(partial(Answer, hub)) as endpoint:
        yield World(folder, hub, endpoint)


@pytest.fixture(scope="module")
def online(world: World) -> dict[str, Result]:
    """Everything that is done while the Hub can be reached."""
    recipe = world.folder / "recipe.yaml"
    recipe.write_text(
        "{experts: {method: none}, slim: {method: none}, layers: {drop_moe: [1]}}"
    )
    return world.session(
        {
            "inspect": ["inspect", "acme/looked_at", "--json"],
            "inspect v2": ["inspect", "acme/looked_at", "--revision", "v2", "--json"],
            "inspect pruned": ["inspect", "acme/pruned", "--json"],
            "inspect pickles": ["inspect", "acme/pickles"],
            "inspect dataset": ["inspect", "acme/dataset"],
            "inspect v3": ["inspect", "acme/looked_at", "--revision", "v3"],
            "cut": world.cut("acme/model", "cut", "--revision", "main"),
            "cut v3": world.cut("acme/model", "none", "--revision", "v3"),
            "cut pickles": world.cut("acme/pickles", "none"),
            "run": [
                "run",
                "acme/model",
                str(world.folder / "run"),
                *("--revision", "v2", "--recipe", str(recipe), "--json"),
            ],
            **{
                f"{command} {repo}": (
                    ["inspect", repo]
                    if command == "inspect"
                    else world.cut(repo, "none")
                )
                for repo in REFUSED
                for command in ("inspect", "cut")
                if repo != "acme/broken"
            },
        }
    )


def assert_refused(result: Result, *says: str) -> None:
    """Status 2 and one line that says so."""
    assert result.code == 2, result
    assert result.out == ""
    (line,) = result.err.splitlines()
    assert line.startswith("error: ")
    for text in says:
        assert text in line


@pytest.mark.slow
def test_inspecting_reads_headers_only(world: World, online: dict[str, Result]) -> None:
    shown = json.loads(online["inspect"].out)
    assert shown["experts_per_layer"] == [8, 8]
    weights = sum(
        path.stat().st_size for path in (world.folder / "model").glob("*.safetensors")
    )
    # The library asks for the first 100 kB of a file, in case its header is longer.
    assert world.hub.bytes_served("acme/looked_at") < 500_000 < weights / 10


def test_inspecting_tells_the_commit_it_looked_at(online: dict[str, Result]) -> None:
    assert json.loads(online["inspect"].out)["revision"] == OLD
    assert json.loads(online["inspect v2"].out)["revision"] == NEW


def test_a_pruned_checkpoint_of_the_hub_can_be_inspected(
    world: World, online: dict[str, Result]
) -> None:
    """Its remap table is needed too, and small."""
    result = online["inspect pruned"]
    assert result.code == 0, result.err
    assert json.loads(result.out)["experts_per_layer"] == [3, 8]


def test_a_cut_of_a_hub_model_is_that_of_a_local_one_with_its_commit(
    world: World, online: dict[str, Result]
) -> None:
    assert online["cut"].code == 0, online["cut"].err
    ours, local = (folder_bytes(world.folder / name) for name in ("cut", "pruned"))
    told = {"README.md", "expert_remap.json", "config.json", "provenance.json"}
    assert ours.keys() == local.keys()
    assert {name for name in ours if ours[name] != local[name]} <= told
    remap = read_json(world.folder / "cut" / "expert_remap.json")
    assert remap["source"]["name"] == "acme/model"
    assert remap["source"]["revision"] == OLD
    card = (world.folder / "cut" / "README.md").read_text("utf-8")
    assert "base_model: acme/model" in card


def test_a_run_pins_the_commit_of_its_revision(
    world: World, online: dict[str, Result]
) -> None:
    assert online["run"].code == 0, online["run"].err
    source = read_json(world.folder / "run" / "provenance.json")["source"]
    assert source["source"] == "acme/model"
    assert source["revision"] == NEW
    assert read_json(world.folder / "run" / "plan.json")["model"]["revision"] == NEW


def test_only_what_a_checkpoint_needs_is_downloaded(
    world: World, online: dict[str, Result]
) -> None:
    assert online["cut"].code == 0
    fetched = world.hub.files_fetched("acme/model")
    assert {"LICENSE", "config.json", "tokenizer.json"} <= fetched
    assert "pytorch_model.bin" not in fetched
    assert (world.folder / "cut" / "LICENSE").read_text() == "Apache License"


def test_an_unknown_revision_is_named(online: dict[str, Result]) -> None:
    for command in ("inspect v3", "cut v3"):
        assert_refused(online[command], "acme/", "no revision 'v3'")


@pytest.mark.parametrize("command", ["inspect", "cut"])
def test_what_one_may_not_see_says_how_to_get_at_it(
    online: dict[str, Result], command: str
) -> None:
    for repo in ("acme/gated", "acme/gated_too"):
        assert_refused(online[f"{command} {repo}"], repo, "is gated", "HF_TOKEN")
    for repo in ("acme/private", "acme/absent"):
        assert_refused(
            online[f"{command} {repo}"], repo, "no such repository", "private"
        )


def test_repositories_without_safetensors_are_refused(
    online: dict[str, Result],
) -> None:
    assert_refused(online["inspect pickles"], "acme/pickles", "no safetensors")
    assert_refused(online["cut pickles"], "Only safetensors")
    assert_refused(online["inspect dataset"], "acme/dataset", "no config.json")


@pytest.mark.slow
def test_without_the_hub_the_cache_will_do(
    world: World, online: dict[str, Result]
) -> None:
    assert online["cut"].code == 0
    before = len(world.hub.served)
    results = world.session(
        {
            "cut": world.cut("acme/model", "offline", "--revision", "main"),
            "inspect": ["inspect", "acme/model", "--json"],
            "not cached": world.cut("acme/never", "none"),
            "inspect not cached": ["inspect", "acme/never"],
        },
        HF_HUB_OFFLINE="1",
    )
    assert results["cut"].code == 0, results["cut"].err
    assert folder_bytes(world.folder / "offline") == folder_bytes(world.folder / "cut")
    assert json.loads(results["inspect"].out)["revision"] == OLD
    for name in ("not cached", "inspect not cached"):
        assert_refused(results[name], "acme/never", "HF_HUB_OFFLINE")
    assert len(world.hub.served) == before


@pytest.mark.slow
def test_a_hub_that_is_down_ends_in_one_line(
    world: World, online: dict[str, Result]
) -> None:
    """The library tries again for half a minute before it gives up."""
    assert online["cut"].code == 0
    results = world.session(
        {
            "inspect": ["inspect", "acme/model", "--json"],
            "cut": world.cut("acme/never", "none"),
        },
        HF_ENDPOINT="http://127.0.0.1:9",
    )
    assert json.loads(results["inspect"].out)["revision"] == OLD
    assert_refused(results["cut"], "acme/never", "cannot be reached")
    broken = world.session({"cut": world.cut("acme/broken", "none")})
    assert_refused(broken["cut"], "acme/broken", "500")

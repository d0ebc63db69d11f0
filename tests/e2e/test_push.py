"""Outputs go to the Hub, for which a stand-in on the loopback interface stands.

It speaks what huggingface_hub asks of the real one when a folder is uploaded: who am I,
create, preupload, the batch API of Git LFS, transfers, commits, information and trees.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from tests.hub_session import Result, session
from tests.loopback import Handler, listening
from tests.reference import LayerCut, write_plan
from tests.tiny import tiny_checkpoint
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.execute import execute_plan
from vllm_moe_prune.decide.cut_plan import load_plan
from vllm_moe_prune.files.json_file import parse_json

TOKEN = "hf_oNeThatNobodyMaySee0123456789"
SIGNED = "X-Signature=secretOfTheStorage"


@dataclass
class Repo:
    """A repository: name of a file -> content."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[list[str]] = field(default_factory=list)


@dataclass
class Hub:
    """What the stand-in holds, and what it has been asked."""

    repos: dict[str, Repo] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    """Large files by their SHA-256, committed or not."""
    asked: list[str] = field(default_factory=list)
    """Method and path, in order."""
    transfers: list[str] = field(default_factory=list)
    """Large files that were sent."""
    refuse_after: int | None = None
    """Of the first upload, transfers after so many fail; None: none does."""


class Answer(Handler):
    """One request to the stand-in."""

    def __init__(self, hub: Hub, *arguments: Any) -> None:
        self.hub = hub
        super().__init__(*arguments)

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(self.path.partition("?")[0])
        self.hub.asked.append(f"{self.command} {path}")
        if self.command == "PUT":
            return self._transfer(path.removeprefix("/storage/"), body)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(401, {"error": "Invalid username or password."})
        if path == "/api/whoami-v2":
            return self._send(200, {"name": "acme", "type": "user"})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        found = re.match(r"/(?:api/models/)?(\w+/[\w.-]+?)(?:\.git)?(/.*|)$", path)
        assert found is not None, path
        repo = self.hub.repos.get(found[1])
        if repo is None:
            headers = {"X-Error-Code": "RepoNotFound"}
            return self._send(404, {"error": "Repository not found"}, headers)
        return self._of_repo(found[1], repo, found[2], body)

    do_GET = do_POST = do_PUT = _handle

    def _of_repo(self, name: str, repo: Repo, rest: str, body: bytes) -> None:
        data = json.loads(body) if rest.startswith(("/preupload", "/info")) else None
        if rest.startswith("/preupload/main"):
            files = [self._mode(repo, one["path"]) for one in data["files"]]
            self._send(200, {"files": files})
        elif rest == "/info/lfs/objects/batch":
            objects = [self._batch(one) for one in data["objects"]]
            self._send(200, {"transfer": "basic", "objects": objects})
        elif rest == "/commit/main":
            self._commit(name, repo, body)
        elif rest.startswith("/tree/main"):
            self._send(
                200,
                [
                    {"type": "file", "path": path, "size": len(data), "oid": "0"}
                    for path, data in repo.files.items()
                ],
            )
        elif rest in ("", "/revision/main"):
            sha = f"{len(repo.commits):040x}"
            found = {"id": name, "modelId": name, "sha": sha, "siblings": []}
            self._send(200, found | {"private": repo.private})
        else:
            raise AssertionError(f"{self.command} {self.path}: not foreseen")

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"http://{self.headers['Host']}/{name}"}
        if asked["organization"] == "others":
            return self._send(403, {"error": "You don't have the rights"})
        if asked["organization"] == "late":
            return self._send(401, {"error": "Your token has expired"})
        if name in self.hub.repos:
            return self._send(409, {"error": "You already created this repo", **url})
        private = asked.get("private", asked.get("visibility") == "private")
        self.hub.repos[name] = Repo(private=bool(private))
        return self._send(200, url)

    def _mode(self, repo: Repo, path: str) -> dict[str, Any]:
        mode = "lfs" if path.endswith(".safetensors") else "regular"
        there = repo.files.get(path)
        oid = None
        if there is not None:
            blob = b"blob %d\0" % len(there) + there
            hashed = {"lfs": hashlib.sha256(there), "regular": hashlib.sha1(blob)}
            oid = hashed[mode].hexdigest()
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def _batch(self, one: dict[str, Any]) -> dict[str, Any]:
        if one["oid"] in self.hub.stored:
            return one
        href = f"http://{self.headers['Host']}/storage/{one['oid']}?{SIGNED}"
        return one | {"actions": {"upload": {"href": href}}}

    def _transfer(self, oid: str, body: bytes) -> None:
        first = self.hub.asked.count("GET /api/whoami-v2") == 1
        limit = self.hub.refuse_after if first else None
        if limit is not None and len(self.hub.transfers) >= limit:
            return self._send(403, {"error": "the storage is tired"})
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.transfers.append(oid)
        self.hub.stored[oid] = body
        return self._send(200, {})

    def _commit(self, name: str, repo: Repo, body: bytes) -> None:
        changed = []
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                repo.files[value["path"]] = self.hub.stored[value["oid"]]
            elif entry["key"] == "deletedFile":
                del repo.files[value["path"]]
            else:
                assert entry["key"] == "header"
                continue
            changed.append(value["path"])
        repo.commits.append(changed)
        oid = f"{len(repo.commits):040x}"
        url = f"http://{self.headers['Host']}/{name}/commit/{oid}"
        self._send(200, {"success": True, "commitOid": oid, "commitUrl": url})

    def _send(
        self, status: int, data: Any, headers: dict[str, str] | None = None
    ) -> None:
        sent = {"Content-Type": "application/json", **(headers or {})}
        self.respond(status, json.dumps(data).encode(), sent)


@dataclass(frozen=True)
class World:
    """A stand-in, and an output to push."""

    folder: Path
    hub: Hub
    endpoint: str

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def push(
        self, commands: dict[str, list[str]], token: str | None = TOKEN
    ) -> dict[str, Result]:
        """Some uploads; all that they say is looked through for secrets."""
        environment = {"HF_TOKEN": token} if token else {}
        found = session(
            {name: ["push", *words] for name, words in commands.items()},
            self.endpoint,
            self.folder / "home",
            # Its own protocol, for which there is no stand-in; LFS does the same.
            HF_HUB_DISABLE_XET="1",
            **environment,
        )
        for result in found.values():
            assert TOKEN not in result.out + result.err
            assert SIGNED not in result.out + result.err
        return found


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("push")
    checkpoint = open_checkpoint(tiny_checkpoint(folder / "in", layers=2))
    plan = write_plan(folder / "plan.json", checkpoint, {0: LayerCut(keep=(0, 2, 5))})
    execute_plan(checkpoint, load_plan(plan), folder / "out", max_shard_bytes=200_000)
    (folder / "out" / ".cache").mkdir()
    (folder / "out" / ".cache" / "private.txt").write_text("nobody's business")
    return folder / "out"


@pytest.fixture
def world(output: Path) -> Iterator[World]:
    hub = Hub()
    with listening(partial(Answer, hub)) as endpoint:
        yield World(output.parent, hub, endpoint)


def uploaded(out: Path) -> dict[str, bytes]:
    """All of an output that a repository should hold, but for the card."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file()
        and path.name not in ("README.md", "run.json")
        and ".cache" not in path.parts
    }


@pytest.mark.slow
def test_an_output_is_uploaded_and_its_card_speaks_of_the_repository(
    world: World,
) -> None:
    out = str(world.out)
    found = world.push(
        {
            "first": [out, "acme/small", "--json", "--base-model", "mistralai/Mixtral"],
            "again": [out, "acme/small", "--base-model", "mistralai/Mixtral"],
        }
    )
    assert found["first"].code == 0, found["first"].err
    data = parse_json(found["first"].out)
    assert data["pushed"]["url"] == f"{world.endpoint}/acme/small"
    assert data["tensors_hashed"] > 0
    repo = world.hub.repos["acme/small"]
    assert repo.private
    files = dict(repo.files)
    card = files.pop("README.md").decode()
    assert files == uploaded(world.out)
    assert data["files"].keys() == {*files, "README.md"}
    assert "base_model: mistralai/Mixtral" in card
    assert "vllm serve acme/small\n" in card
    assert "<this folder>" not in card
    for heading in ("## Scores", "## Limits", "Recipe `", "size of the tensors"):
        assert heading in card
    # The card is last: until then nothing says that the model is there.
    assert repo.commits[-1] == ["README.md"]
    assert not any("README.md" in commit for commit in repo.commits[:-1])
    # The local card still speaks of a folder.
    assert "<this folder>" in (world.out / "README.md").read_text("utf-8")

    # Nothing has changed: nothing is sent, and no empty commit is made.
    sent = len(world.hub.transfers)
    assert found["again"].code == 0, found["again"].err
    assert "Pushed out" in found["again"].out
    assert len(world.hub.transfers) == sent == len(set(world.hub.transfers))
    assert len(repo.commits) == 2


@pytest.mark.slow
def test_an_interrupted_upload_continues(world: World) -> None:
    world.hub.refuse_after = 2
    old = {"model-00099-of-00099.safetensors": b"x", "notes.txt": b"kept"}
    world.hub.repos["acme/small"] = Repo(private=True, files=dict(old))
    command = [str(world.out), "acme/small"]
    found = world.push({"stopped": command, "done": command})
    assert found["stopped"].code == 2
    line = found["stopped"].err.splitlines()[-1]
    assert line.startswith("error: acme/small: the upload stopped: ")
    assert "run the same command again" in line
    assert found["done"].code == 0, found["done"].err
    # What had arrived was not sent again.
    assert len(world.hub.transfers) == len(set(world.hub.transfers)) > 2
    repo = world.hub.repos["acme/small"]
    # Weights of an earlier upload are gone: vLLM would read them.
    assert repo.files.keys() == {*uploaded(world.out), "README.md", "notes.txt"}
    assert repo.commits[-1] == ["README.md"]


@pytest.mark.slow
def test_without_a_token_or_with_a_dry_run_nobody_is_asked(world: World) -> None:
    found = world.push(
        {
            "plain": [str(world.out), "acme/small", "--dry-run"],
            "json": [str(world.out), "acme/small", "--dry-run", "--json"],
            "no token": [str(world.out), "acme/small"],
        },
        token=None,
    )
    assert found["plain"].code == found["json"].code == 0
    assert "config.json" in found["plain"].out
    assert "its owner" in found["plain"].out
    assert "--base-model" in found["plain"].out
    data = parse_json(found["json"].out)
    assert data["pushed"] is None
    assert set(data["files"]) == {*uploaded(world.out), "README.md"}
    assert found["no token"].code == 2
    assert "acme/small: the Hub does not know you." in found["no token"].err
    assert world.hub.asked == []


@pytest.mark.slow
def test_what_cannot_be_uploaded_is_refused_in_one_line(world: World) -> None:
    out, broken = world.out, world.folder / "broken"
    if not broken.exists():
        broken.mkdir()
        for name, data in uploaded(out).items():
            (broken / name).parent.mkdir(exist_ok=True)
            (broken / name).write_bytes(data)
        (broken / "README.md").write_bytes((out / "README.md").read_bytes())
        shard = sorted(broken.glob("*.safetensors"))[0]
        shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    world.hub.repos["acme/public"] = Repo(private=False)
    commands = {
        "no id": [str(out), "small"],
        "no base id": [str(out), "acme/small", "--base-model", "Mixtral"],
        "no output": [str(world.folder / "in"), "acme/small"],
        "damaged": [str(broken), "acme/small"],
        "others": [str(out), "others/small"],
        "public": [str(out), "acme/public"],
        "late": [str(out), "late/small"],
    }
    says = {
        "no id": "small: is no Hub id of the form owner/name.",
        "no base id": "Mixtral: is no Hub id",
        "no output": "in: is no folder that vllm-moe-prune wrote.",
        "damaged": "broken",
        "others": "others/small: your token may not write there.",
        "public": "acme/public: exists and is public.",
        "late": "late/small: the Hub does not know you.",
    }
    for name, result in world.push(commands).items():
        assert result.code == 2, (name, result)
        assert says[name] in result.err.splitlines()[-1], (name, result.err)
    assert world.hub.transfers == []

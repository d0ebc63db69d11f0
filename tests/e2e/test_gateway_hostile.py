"""Backends whose answers are hostile: none of them touches another, or the gateway."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from tests.gateway import CHAT, chat, metric, start_gateway, start_stub, until
from tests.server import Process, free_port, running

pytestmark = pytest.mark.slow
MODELS = b'{"object": "list", "data": [{"id": "%s", "object": "model"}]}'
DEEP = b"[" * 600 + b"]" * 600
SPARSITY = '{"sparsity_achieved": {"of_experts": %s, "parameters_before": %s}}'

# name → model list, provenance. Nothing here may end a poll, a page or the gateway.
HOSTILE = {
    "huge": (MODELS % b"huge", b'{"source_bytes": 1%s}' % (b"0" * 400)),
    "infinite": (MODELS % b"infinite", (SPARSITY % ("1e999", "-1")).encode()),
    "nan": (MODELS % b"nan", (SPARSITY % ("NaN", "Infinity")).encode()),
    "digits": (MODELS % b"digits", b'{"source_bytes": 1%s}' % (b"0" * 5000)),
    "deep-record": (MODELS % b"deep-record", b'{"sparsity_achieved": %s}' % DEEP),
    "surrogate": (MODELS % rb"\ud800", b"{}"),
    "deep": (b'{"data": [{"id": "deep", "permission": %s}]}' % DEEP, b"{}"),
    "deeper": (b'{"data": [{"id": "deeper", "x": %s}]}' % (b"[" * 10**5), b"{}"),
    "no-ids": (b'{"data": [{"id": 7}, {"id": null}, {}]}', b"{}"),
    "no-list": (b'{"data": "abc"}', b"[]"),
    "long": (MODELS % (b"a" * 10**6), b"{}"),
    "control": (MODELS % rb"a\r\nINFO:  forged", b"{}"),
}


class Canned(ThreadingHTTPServer):
    """Answers a GET of a path with the bytes it has for it."""

    daemon_threads = True

    def __init__(self, models: bytes, provenance: bytes) -> None:
        super().__init__(("127.0.0.1", 0), CannedHandler)
        self.answers = {
            "/health": b"",
            "/v1/models": models,
            "/plugins/moe-prune/provenance": provenance,
        }


class CannedHandler(BaseHTTPRequestHandler):
    server: Canned

    def do_GET(self) -> None:
        body = self.server.answers.get(self.path)
        self.send_response(404 if body is None else 200)
        self.send_header("content-length", str(len(body or b"")))
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, *_: object) -> None:
        """Not on stderr."""


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Process, int]]:
    """A gateway before all hostile backends, and the port of a good one, not yet up."""
    folder = tmp_path_factory.mktemp("hostile")
    servers = {name: Canned(*answers) for name, answers in HOSTILE.items()}
    for server in servers.values():
        threading.Thread(target=server.serve_forever, daemon=True).start()
    port = free_port()
    addresses = {
        name: f"http://127.0.0.1:{s.server_port}" for name, s in servers.items()
    }
    addresses["good"] = f"http://127.0.0.1:{port}"
    front = start_gateway(folder, addresses, ready=False)
    with running(front):
        yield front, port
    for server in servers.values():
        server.shutdown()
        server.server_close()


def test_hostile_backends_touch_nobody_else(
    crowd: tuple[Process, int], tmp_path: Path
) -> None:
    front, port = crowd
    up = "moe_prune_backend_up"
    with running(start_stub(tmp_path, "good", port)) as (good,):
        until(lambda: metric(front, up, backend="good") == 1, "the good one is up")
        assert httpx.post(front.url + CHAT, json=chat("good")).status_code == 200
        for path in (
            "/ready",
            "/backends",
            "/v1/models",
            "/v1/models/good",
            "/metrics",
        ):
            answer = httpx.get(front.url + path)
            assert answer.status_code == 200, path
            assert b"\\ud8" not in answer.content
        listed = httpx.get(f"{front.url}/v1/models").json()["data"]
        assert "good" in {model["id"] for model in listed}
        good.kill()
        until(lambda: metric(front, up, backend="good") == 0, "it is seen to be down")
    with running(start_stub(tmp_path, "good", port)):
        until(lambda: metric(front, up, backend="good") == 1, "and to be back")
    assert "Traceback" not in front.said()
    assert "\nINFO:  forged" not in front.said()


def test_what_hostile_backends_say_of_themselves(crowd: tuple[Process, int]) -> None:
    front, _ = crowd
    states = {
        one["name"]: one
        for one in httpx.get(f"{front.url}/backends").json()["backends"]
    }
    down = {"surrogate", "deep", "deeper", "no-ids", "no-list", "long", "control"}
    assert {name for name in HOSTILE if not states[name]["up"]} == down
    text = httpx.get(f"{front.url}/metrics").text
    numbers = [
        line for line in text.splitlines() if line.startswith("moe_prune_model_")
    ]
    assert numbers == []
    assert json.dumps(states).isascii()

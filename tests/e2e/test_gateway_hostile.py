"""Backends, clients and web pages that are hostile."""

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from tests.gateway import CHAT, chat, metric, start_gateway, start_stub, streamed, until
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
COUNTS = b'{"usage": {"prompt_tokens": 1%s, "completion_tokens": true}}' % (b"0" * 400)
PAGE = "https://page.example"


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

    def do_POST(self) -> None:
        """A completion with token counts that no float can hold."""
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(COUNTS)))
        self.end_headers()
        self.wfile.write(COUNTS)

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


def test_token_counts_beyond_a_float_are_not_counted(
    crowd: tuple[Process, int],
) -> None:
    front, _ = crowd
    answer = httpx.post(front.url + CHAT, json=chat("huge"))
    assert (answer.status_code, answer.content) == (200, COUNTS)
    status = {"backend": "huge", "status": "200"}
    assert metric(front, "moe_prune_requests_total", **status) == 1
    assert metric(front, "moe_prune_tokens_total", backend="huge") == 0
    assert "Traceback" not in front.said()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Process, Process]]:
    """A gateway without keys, with little patience, and the one backend behind it."""
    folder = tmp_path_factory.mktemp("pair")
    with running(start_stub(folder, "m")) as (backend,):
        patience = {"body_timeout_s": 1, "request_timeout_s": 2}
        with running(start_gateway(folder, {"b": backend.url}, **patience)) as (front,):
            yield front, backend


def seen_by(backend: Process) -> int:
    """How many requests a stub has got."""
    return len(httpx.get(f"{backend.url}/stub/seen").json())


def exchange(server: Process, request: bytes) -> bytes:
    """Everything that comes back for some bytes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as raw:
        raw.sendall(request)
        return b"".join(iter(lambda: raw.recv(65536), b""))


@pytest.mark.parametrize("method", ["OPTIONS", "POST", "GET"])
def test_no_web_page_can_use_a_local_gateway(
    pair: tuple[Process, Process], method: str
) -> None:
    front, backend = pair
    before = seen_by(backend)
    headers = {"origin": PAGE, "access-control-request-method": "POST"}
    for path in (CHAT, "/backends/b/v1/echo", "/backends", "/"):
        answer = httpx.request(method, front.url + path, headers=headers)
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "origin_not_allowed"
        assert not [
            name for name in answer.headers if name.startswith("access-control")
        ]
    assert seen_by(backend) == before


def test_what_a_backend_says_of_other_origins_is_dropped(
    pair: tuple[Process, Process],
) -> None:
    front, backend = pair
    own = {"origin": front.url}
    direct = httpx.post(f"{backend.url}/v1/echo", content=b"x")
    assert direct.headers["access-control-allow-origin"] == "*"
    answer = httpx.post(f"{front.url}/v1/echo", content=b"x", headers=own)
    assert answer.content == b"x"
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert answer.headers["content-security-policy"] == "sandbox"


def test_a_page_that_is_allowed_can(
    pair: tuple[Process, Process], tmp_path: Path
) -> None:
    _, backend = pair
    front = start_gateway(
        tmp_path, {"b": backend.url}, allowed_origins=f"{PAGE}, http://x:1"
    )
    with running(front):
        ask = {"origin": PAGE, "access-control-request-method": "POST"}
        ask["access-control-request-headers"] = "authorization, content-type"
        preflight = httpx.options(front.url + CHAT, headers=ask)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == PAGE
        assert "authorization" in preflight.headers["access-control-allow-headers"]
        answer = httpx.post(front.url + CHAT, json=chat("m"), headers={"origin": PAGE})
        assert answer.status_code == 200
        assert answer.headers.get_list("access-control-allow-origin") == [PAGE]
        other = {"origin": "https://other.example"}
        assert (
            httpx.post(front.url + CHAT, json=chat("m"), headers=other).status_code
            == 403
        )


@pytest.mark.parametrize(
    ("hosts", "status"),
    [
        ([], 400),
        ([b"localhost", b"localhost"], 400),
        ([b""], 400),
        ([b"local host"], 400),
        ([b"a/b"], 400),
        ([b"rebound.example"], 403),
        ([b"localhost.rebound.example:80"], 403),
        ([b"LOCALHOST:80"], 200),
        ([b"127.0.0.1"], 200),
        ([b"[::1]:8080"], 200),
    ],
)
def test_one_valid_host_is_needed(
    pair: tuple[Process, Process], hosts: list[bytes], status: int
) -> None:
    front, backend = pair
    before = seen_by(backend)
    lines = b"".join(b"Host: %s\r\n" % host for host in hosts)
    closing = b"Connection: close\r\n\r\n"
    for path in (b"/v1/echo", b"/health"):
        said = exchange(front, b"GET %s HTTP/1.1\r\n%s%s" % (path, lines, closing))
        assert re.match(rb"HTTP/1.1 (\d+) ", said), said
        answered = int(said.split()[1])
        assert answered == (201 if status == 200 and b"echo" in path else status)
    assert seen_by(backend) == before + (status == 200)


@pytest.mark.parametrize(
    "rest",
    [
        b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
        b"Content-Length: %s\r\n\r\n" % (b"9" * 5000),
        b"Content-Length: +1\r\n\r\na",
        b"X: a\r\n b\r\n\r\n",
        b"Host : localhost\r\n\r\n",
        b"X: a\x00b\r\n\r\n",
    ],
)
def test_requests_that_can_be_read_in_two_ways(
    pair: tuple[Process, Process], rest: bytes
) -> None:
    front, backend = pair
    before = seen_by(backend)
    said = exchange(front, b"POST /v1/echo HTTP/1.1\r\nHost: localhost\r\n" + rest)
    assert said.startswith(b"HTTP/1.1 400 ")
    assert seen_by(backend) == before


def test_http_1_0_may_have_no_host(pair: tuple[Process, Process]) -> None:
    front, _ = pair
    assert b" 200 OK" in exchange(front, b"GET /health HTTP/1.0\r\n\r\n")[:20]


@pytest.mark.parametrize("method", ["TRACE", "PURGE", "OPTIONS", "PROPFIND", "QUERY"])
def test_methods_that_are_not_passed_on(
    pair: tuple[Process, Process], method: str
) -> None:
    front, backend = pair
    before = seen_by(backend)
    for path in ("/v1/echo", CHAT, "/backends/b/v1/x", "/v1/models", "/health", "/"):
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n"
        said = exchange(front, f"{head}Connection: close\r\n\r\n".encode())
        assert b'"code": "method_not_allowed"' in said or b" 400 " in said[:13], said
        assert b"\r\nallow: " in said.lower() or b" 400 " in said[:13]
    assert seen_by(backend) == before


@pytest.mark.parametrize(
    "framing", ["content-length: 100000", "transfer-encoding: chunked"]
)
def test_a_body_that_only_drips(pair: tuple[Process, Process], framing: str) -> None:
    front, _ = pair
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\n{framing}\r\n\r\n"
    start = time.monotonic()
    with socket.create_connection(("127.0.0.1", front.port), timeout=20) as raw:
        raw.sendall(head.encode())
        raw.settimeout(0.1)
        said = b""
        while not said and time.monotonic() < start + 20:
            with suppress(TimeoutError):
                raw.sendall(b"x" if "length" in framing else b"1\r\nx\r\n")
                said = raw.recv(65536)
    assert said.startswith(b"HTTP/1.1 408 ")
    assert time.monotonic() - start > 0.9


def test_an_answer_without_end_is_ended(pair: tuple[Process, Process]) -> None:
    front, backend = pair
    endless = streamed("m", events=10**6, gap_s=0.02)
    answer = httpx.post(front.url + CHAT, json=endless)
    *_, last = answer.text.strip().split("\n\n")
    assert (
        json.loads(last.removeprefix("data: "))["error"]["code"] == "request_too_long"
    )
    entries = f"{backend.url}/stub/seen"
    until(lambda: httpx.get(entries).json()[-1]["ended"] == "cancelled", "let go")

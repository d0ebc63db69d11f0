"""What goes wrong around a gateway, brought about for real."""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import APIError, AuthenticationError, OpenAI

from tests.gateway import CHAT, chat, metric, start_gateway, start_stub, streamed, until
from tests.loopback import Handler, listening
from tests.server import TOOL, Process, running

pytestmark = pytest.mark.slow
Start = Callable[..., Process]
MIB = 2**20


@pytest.fixture
def stub(tmp_path: Path) -> Iterator[Start]:
    """Starts stub backends, and ends them."""
    started: list[Process] = []

    def start(*arguments: Any, **more: Any) -> Process:
        started.append(start_stub(tmp_path, *arguments, **more))
        return started[-1]

    yield start
    for server in started:
        server.kill()


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Start]:
    """Starts gateways, and ends them."""
    started: list[Process] = []

    def start(*backends: Process, **variables: Any) -> Process:
        addresses = {f"b{at}": server.url for at, server in enumerate(backends)}
        started.append(start_gateway(tmp_path, addresses, **variables))
        return started[-1]

    yield start
    for server in started:
        server.kill()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Process, Process]]:
    """A gateway and one of its two backends, for faults that end neither."""
    folder = tmp_path_factory.mktemp("both")
    first, second = start_stub(folder, "m"), start_stub(folder, "n")
    with running(first, second):
        front = start_gateway(folder, {"b0": first.url, "b1": second.url})
        with running(front):
            yield front, first


def seen(server: Process) -> list[dict[str, Any]]:
    """What a stub was asked."""
    entries: list[dict[str, Any]] = httpx.get(f"{server.url}/stub/seen").json()
    return entries


def resident_mib(server: Process) -> float:
    """Memory of a process."""
    pages = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB


def error_of(event: str) -> dict[str, Any]:
    """The error that a stream ends with."""
    error: dict[str, Any] = json.loads(event.removeprefix("data: "))["error"]
    return error


def test_a_backend_killed_mid_stream(stub: Start, gateway: Start) -> None:
    dies, lives = stub("dies"), stub("lives")
    front = gateway(dies, lives)
    client = OpenAI(base_url=f"{front.url}/v1", api_key="none", max_retries=0)
    wishes = {"events": 2000, "gap_s": 0.01}
    messages: Any = [{"role": "user", "content": "Hi"}]

    def ask(model: str, **wishes: Any) -> Any:
        return client.chat.completions.create(
            model=model, messages=messages, stream=True, extra_body={"stub": wishes}
        )

    failing, going_on = ask("dies", **wishes), ask("lives", events=100, gap_s=0.01)
    pieces = [next(failing), next(failing), next(going_on)]
    dies.kill()
    with pytest.raises(APIError, match="Backend 'b0' ended the connection"):
        pieces += list(failing)
    assert sum(1 for _ in going_on) == 100  # the other 99 and the last, empty one
    with pytest.raises(APIError, match="'b0' does not answer"):
        ask("dies")
    code = {"backend": "b0", "code": "backend_broken"}
    assert metric(front, "moe_prune_errors_total", **code) == 1
    until(lambda: metric(front, "moe_prune_backend_up", backend="b0") == 0, "down")
    assert httpx.get(f"{front.url}/ready").status_code == 200
    lives.kill()
    until(lambda: httpx.get(f"{front.url}/ready").status_code == 503, "not ready")


def test_half_an_event_is_never_handed_out(stub: Start, gateway: Start) -> None:
    backend = stub("m")
    front = gateway(backend)
    request = streamed("m", events=2, half=True)
    with httpx.stream("POST", front.url + CHAT, json=request) as answer:
        lines = answer.iter_lines()
        got = [next(lines), next(lines), next(lines), next(lines)]
        backend.kill()
        got += list(lines)
    events = [line for line in got if line]
    assert len(events) == 3
    assert all(json.loads(event.removeprefix("data: ")) for event in events)
    assert error_of(events[-1])["code"] == "backend_broken"


def test_a_backend_killed_before_its_answer(stub: Start, gateway: Start) -> None:
    # Both serve the model; the one that was asked may have acted: nobody else is.
    first, second = stub("m"), stub("m")
    front = gateway(first, second)
    with httpx.Client(base_url=front.url, timeout=20) as client:
        killed: list[Process] = []

        def kill_whoever_was_asked(request: httpx.Request) -> None:
            asked = {server: len(seen(server)) for server in (first, second)}

            def kill() -> None:
                until(lambda: any(len(seen(s)) > asked[s] for s in asked), "asked")
                killed.append(next(s for s in asked if len(seen(s)) > asked[s]))
                killed[0].kill()

            threading.Thread(target=kill).start()

        client.event_hooks["request"] = [kill_whoever_was_asked]
        answer = client.post(CHAT, json=chat("m", stub={"first_s": 30}))
        client.event_hooks["request"] = []
        assert answer.status_code == 502
        assert answer.json()["error"]["code"] == "backend_broken"
        (alive,) = {first, second} - set(killed)
        assert seen(alive) == []
        # Where a connection is refused nothing was sent, so the next one is asked.
        for _ in range(5):
            assert client.post(CHAT, json=chat("m")).status_code == 200
        assert len(seen(alive)) == 5


def test_the_least_busy_of_two_is_asked(stub: Start, gateway: Start) -> None:
    first, second = stub("m"), stub("m")
    front = gateway(first, second)
    long = streamed("m", events=1000, gap_s=0.01)
    with (
        httpx.stream("POST", front.url + CHAT, json=long),
        httpx.stream("POST", front.url + CHAT, json=long),
    ):
        assert [len(seen(server)) for server in (first, second)] == [1, 1]


def test_a_slow_backend(stub: Start, gateway: Start) -> None:
    slow, quick = stub("slow"), stub("quick")
    front = gateway(slow, quick, read_timeout_s=0.5)
    start = time.monotonic()
    answer = httpx.post(front.url + CHAT, json=chat("slow", stub={"first_s": 5}))
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "backend_timeout"
    assert time.monotonic() - start < 3
    gaps = httpx.post(front.url + CHAT, json=streamed("slow", gap_s=0.2, events=5))
    assert gaps.text.endswith("data: [DONE]\n\n")
    hangs = httpx.post(front.url + CHAT, json=streamed("slow", gap_s=5, events=5))
    *_, last = hangs.text.strip().split("\n\n")
    assert error_of(last)["code"] == "backend_timeout"
    until(lambda: seen(slow)[-1]["ended"] == "cancelled", "the slow one is let go")
    assert httpx.post(front.url + CHAT, json=chat("quick")).status_code == 200


def test_a_restarted_backend(stub: Start, gateway: Start) -> None:
    backend = stub("m")
    front = gateway(backend)
    ask = {"url": front.url + CHAT, "json": chat("m")}
    with httpx.Client() as client:
        assert client.post(**ask).status_code == 200
        backend.kill()
        refused = client.post(**ask)
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        stub("m", port=backend.port)
        # At once: what is thought to be down is asked nevertheless.
        assert client.post(**ask).status_code == 200
    until(lambda: metric(front, "moe_prune_backend_up", backend="b0") == 1, "up")


def test_a_backend_that_starts_after_the_gateway(stub: Start, gateway: Start) -> None:
    first, second = stub("first"), stub("second")
    second.kill()
    front = gateway(first, second)
    answer = httpx.post(front.url + CHAT, json=chat("second"))
    assert answer.status_code == 503, "not 404: nobody knows yet what it serves"
    stub("second", port=second.port)
    until(lambda: metric(front, "moe_prune_backend_up", backend="b1") == 1, "up")
    assert httpx.post(front.url + CHAT, json=chat("second")).status_code == 200


@pytest.mark.parametrize("when", ["mid-stream", "before the answer"])
def test_a_client_that_leaves_ends_the_work(
    both: tuple[Process, Process], when: str
) -> None:
    front, backend = both
    code = {"backend": "b0", "code": "client_gone"}
    before = metric(front, "moe_prune_errors_total", **code)
    if when == "mid-stream":
        request = streamed("m", events=10**6, gap_s=0.01)
        with httpx.stream("POST", front.url + CHAT, json=request) as answer:
            next(answer.iter_bytes())
    else:
        request = streamed("m", first_s=1, events=10**6, gap_s=0.01)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(front.url + CHAT, json=request, timeout=0.3)
    until(lambda: seen(backend)[-1]["ended"] == "cancelled", "cancelled")
    in_flight = "moe_prune_requests_in_flight"
    until(lambda: metric(front, in_flight, backend="b0") == 0, "none in flight")
    assert metric(front, "moe_prune_errors_total", **code) == before + 1


@pytest.mark.parametrize(
    "body", [b'{"model":', b"\xff\xfe", b"[" * 100_000, b'"m"', b"[]", b""]
)
def test_malformed_json(both: tuple[Process, Process], body: bytes) -> None:
    front, backend = both
    before = len(seen(backend))
    headers = {"content-type": "application/json"}
    answer = httpx.post(front.url + CHAT, content=body, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] in {"invalid_json", "model_required"}
    assert len(seen(backend)) == before


def test_a_body_of_100_mb(both: tuple[Process, Process]) -> None:
    front, backend = both
    asked = len(seen(backend))
    before = resident_mib(front)
    big = b"x" * (100 * MIB)
    announced = httpx.post(front.url + CHAT, content=big)
    pieces = (b"x" * MIB for _ in range(100))
    counted = httpx.post(front.url + CHAT, content=pieces)
    for answer in (announced, counted):
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "request_too_large"
    assert len(seen(backend)) == asked
    assert resident_mib(front) < before + 80
    fits = b" " * (20 * MIB) + json.dumps(chat("m")).encode()
    headers = {"content-type": "application/json"}
    answer = httpx.post(front.url + CHAT, content=fits, headers=headers, timeout=30)
    assert answer.status_code == 200


def connect(server: Process, data: bytes) -> socket.socket:
    """A connection on which something was sent."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    connection.sendall(data)
    return connection


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/1.1\r\nx: " + b"a" * 70_000,
        b"GET /health HTTP/1.1\r\n" + b"x: aaaaaaaaaaaaaaaa\r\n" * 4000 + b"\r\n",
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
    ],
    ids=["one header", "many headers", "address"],
)
def test_a_flood_of_headers(both: tuple[Process, Process], head: bytes) -> None:
    front, _ = both
    with connect(front, head) as connection:
        answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert b'"code": "headers_too_large"' in answer
    assert httpx.post(front.url + CHAT, json=chat("m")).status_code == 200


def test_what_is_no_http(both: tuple[Process, Process]) -> None:
    front, _ = both
    with connect(front, b"\x16\x03\x01 hello\r\n\r\n") as connection:
        answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b'"code": "invalid_http"' in answer


def test_a_body_that_never_ends_and_a_reader_that_never_reads(
    stub: Start, gateway: Start
) -> None:
    backend = stub("m")
    front = gateway(backend, client_timeout_s=1)
    head = (
        f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    )
    with connect(front, f"{head}content-length: 100\r\n\r\n{{".encode()) as connection:
        assert connection.recv(65536).startswith(b"HTTP/1.1 408 ")
    before = resident_mib(front)
    body = json.dumps(streamed("m", events=20_000, size=10_000)).encode()
    request = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
    with connect(front, request):
        until(lambda: seen(backend)[-1]["ended"] == "cancelled", "let go")
    assert resident_mib(front) < before + 50, "200 MB were there to be held back"


class Odd(Handler):
    """Answers with the status that its path ends in, and announces five bytes."""

    def do_GET(self) -> None:
        last = self.path.rpartition("/")[2]
        models = b'{"object": "list", "data": [{"id": "odd"}]}'
        self.send_response(int(last) if last.isdigit() else 200)
        self.send_header("content-type", "application/json")
        size = len(models) if last == "models" else 0 if last == "health" else 5
        self.send_header("content-length", str(size))
        self.end_headers()
        self.wfile.write(models if last == "models" else b"")


def test_answers_whose_length_is_not_that_of_a_body(tmp_path: Path) -> None:
    with (
        listening(Odd) as address,
        running(start_gateway(tmp_path, {"odd": address})) as (front,),
    ):
        for status, seen_by_client in ((304, 304), (204, 204), (600, 502)):
            answer = httpx.get(f"{front.url}/v1/{status}")
            assert answer.status_code == seen_by_client
        assert metric(front, "moe_prune_requests_total", status="600") == 0
        assert "Traceback" not in front.said()


def test_more_requests_than_allowed(stub: Start, gateway: Start) -> None:
    backend = stub("m")
    front = gateway(backend, max_concurrent=1)
    long = streamed("m", events=10**6, gap_s=0.01)
    with httpx.stream("POST", front.url + CHAT, json=long) as first:
        pieces = first.iter_bytes()
        next(pieces)
        refused = httpx.post(front.url + CHAT, json=chat("m"))
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "too_many_requests"
        assert refused.headers["retry-after"]
        assert httpx.get(f"{front.url}/health").status_code == 200
    in_flight = "moe_prune_requests_in_flight"
    until(lambda: metric(front, in_flight, backend="b0") == 0, "a free place")
    assert httpx.post(front.url + CHAT, json=chat("m")).status_code == 200


def test_keys(stub: Start, gateway: Start, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("from-file\n\n")
    backend = stub("m")
    variables = {"api_keys": "key-one, key-two", "api_key_file": keys}
    front = gateway(backend, backend_api_key="inner", **variables)

    def ask(key: str) -> Any:
        client = OpenAI(base_url=f"{front.url}/v1", api_key=key, max_retries=0)
        return client.chat.completions.create(model="m", messages=[])

    for key in ("key-one", "key-two", "from-file"):
        assert ask(key).model == "m"
    sent = [value for name, value in seen(backend)[-1]["headers"] if "auth" in name]
    assert sent == ["Bearer inner"]
    for key in ("wrong-key", "key-on", "key-one2", "inner", "key-one, key-two"):
        with pytest.raises(AuthenticationError) as caught:
            ask(key)
        assert caught.value.code == "invalid_api_key"
    for path in ("/v1/models", "/backends", "/backends/b0/v1/models", "/nothing"):
        assert httpx.get(front.url + path).status_code == 401
        basic = {"authorization": "Basic key-one"}
        assert httpx.get(front.url + path, headers=basic).status_code == 401
    twice = [("authorization", "Bearer key-one")] * 2
    assert httpx.get(f"{front.url}/v1/models", headers=twice).status_code == 401
    for path in ("/health", "/ready", "/metrics", "/", "/compare.html"):
        assert httpx.get(front.url + path).status_code == 200
    code = {"backend": "", "code": "invalid_api_key"}
    assert metric(front, "moe_prune_errors_total", **code) == 14
    said = front.said() + httpx.get(f"{front.url}/metrics").text
    assert not any(key in said for key in ("key-one", "from-file", "inner", "wrong"))


def test_without_keys_the_clients_own_goes_on(stub: Start, gateway: Start) -> None:
    backend = stub("m")
    front = gateway(backend)
    headers = {"authorization": "Bearer mine"}
    httpx.post(front.url + CHAT, json=chat("m"), headers=headers)
    assert ["authorization", "Bearer mine"] in seen(backend)[-1]["headers"]


def test_sigterm_while_streaming_waits_and_exits_0(stub: Start, gateway: Start) -> None:
    front = gateway(stub("m"))
    request = streamed("m", events=100, gap_s=0.01)
    with (
        httpx.Client() as idle,
        httpx.stream("POST", front.url + CHAT, json=request) as answer,
    ):
        idle.get(f"{front.url}/health")
        pieces = answer.iter_text()
        text = next(pieces)
        front.process.send_signal(signal.SIGTERM)
        time.sleep(0.4)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{front.url}/health")
        text += "".join(pieces)
    assert text.endswith("data: [DONE]\n\n")
    assert front.process.wait(timeout=10) == 0
    assert "Traceback" not in front.said()


def test_sigterm_waits_only_so_long_and_says_so(stub: Start, gateway: Start) -> None:
    backend = stub("m")
    front = gateway(backend, drain_s=1)
    request = streamed("m", events=10**6, gap_s=0.01)
    with httpx.stream("POST", front.url + CHAT, json=request) as answer:
        pieces = answer.iter_text()
        text = next(pieces)
        front.process.send_signal(signal.SIGTERM)
        text += "".join(pieces)
    *_, last = text.strip().split("\n\n")
    assert error_of(last)["code"] == "shutting_down"
    assert front.process.wait(timeout=10) == 0
    until(lambda: seen(backend)[-1]["ended"] == "cancelled", "let go")


def test_an_address_that_is_taken_is_one_line(stub: Start, tmp_path: Path) -> None:
    taken = stub("m")
    command = [*TOOL, "gateway", "--backend", "a=http://x", "--port", str(taken.port)]
    log = tmp_path / "taken.log"
    failed = Process(command, taken.port, log)
    assert failed.process.wait(timeout=30) == 2
    said = failed.said()
    assert said.startswith(f"error: cannot listen on 127.0.0.1, port {taken.port}: ")
    assert said.count("\n") == 1
    assert httpx.get(f"{taken.url}/health").status_code == 200

"""uvicorn's protocol as the gateway has it: slow heads, offers to upgrade, trailers."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from moe_prune_gateway.http_protocol import bounded_protocol
from tests.gateway import until

HEAD_TIMEOUT_S = 0.6
UPGRADE = (
    b"Connection: Upgrade, HTTP2-Settings, X-A\r\nUpgrade: h2c\r\nHTTP2-Settings: AA"
)
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """A uvicorn server under our protocol that tells what it was asked."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        told = {
            "asked": f"{scope['method']} {scope['path']}",
            "headers": [(n.decode(), v.decode()) for n, v in scope["headers"]],
            "body": body.decode(),
        }
        sent = json.dumps(told).encode()
        headers = [(b"content-length", b"%d" % len(sent))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": sent})

    with socket.create_server(("127.0.0.1", 0)) as listener:
        protocol = bounded_protocol(stall_timeout_s=1, head_timeout_s=HEAD_TIMEOUT_S)
        config = uvicorn.Config(app, http=protocol, ws="none", log_level="error")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        until(lambda: server.started, "started")
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join()


@pytest.fixture
def client(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        yield connection


def answer(client: socket.socket) -> dict[str, Any]:
    """What the server was asked, as it tells."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = client.recv(1)
        assert byte, head
        head += byte
    assert head.startswith(b"HTTP/1.1 200 ")
    length = int(head.partition(b"content-length: ")[2].split(b"\r\n")[0])
    return json.loads(client.recv(length, socket.MSG_WAITALL))  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nx: "])
def test_a_slow_head_is_not_waited_for(client: socket.socket, sent: bytes) -> None:
    start = time.monotonic()
    client.sendall(sent)
    assert client.recv(100) == b""
    assert HEAD_TIMEOUT_S - 0.1 < time.monotonic() - start < 5


@pytest.mark.slow
def test_a_connection_may_be_idle_between_requests(client: socket.socket) -> None:
    request = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
    for _ in range(2):
        client.sendall(request[:10])
        time.sleep(0.1)
        client.sendall(request[10:])
        assert answer(client)["asked"] == "GET /"
        time.sleep(HEAD_TIMEOUT_S + 0.2)


@pytest.mark.parametrize(
    "framing", [b"Content-Length: %d", b"Transfer-Encoding: chunked"]
)
@pytest.mark.parametrize("apart", [False, True])
def test_an_offer_to_upgrade_is_declined_and_nothing_lost(
    client: socket.socket, framing: bytes, apart: bool
) -> None:
    # A body that would be a request, if the connection were thought to be free.
    body = SMUGGLED
    if b"%" in framing:
        framing %= len(body)
    else:
        body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    head = b"POST /v1/x HTTP/1.1\r\nHost: x\r\nX-A: 1\r\n%s\r\n%s\r\n\r\n"
    next_one = b"GET /next HTTP/1.1\r\nHost: x\r\n\r\n"
    parts = [head % (UPGRADE, framing), body + next_one]
    for part in parts if apart else [b"".join(parts)]:
        client.sendall(part)
        time.sleep(0.2)
    told = answer(client)
    assert (told["asked"], told["body"]) == ("POST /v1/x", SMUGGLED.decode())
    headers = dict(told["headers"])
    assert not {"upgrade", "http2-settings"} & headers.keys()
    # What else was said to be for this connection only still is.
    assert headers["connection"] == "X-A"
    assert answer(client)["asked"] == "GET /next"


def test_an_offer_to_upgrade_may_come_byte_by_byte(client: socket.socket) -> None:
    request = b"POST /a HTTP/1.1\r\n%s\r\nContent-Length: 3\r\n\r\nabc" % UPGRADE
    for at in range(len(request)):
        client.sendall(request[at : at + 1])
    told = answer(client)
    assert (told["asked"], told["body"]) == ("POST /a", "abc")


@pytest.mark.parametrize("what", [b"websocket", b"TLS/1.0, IRC/6.9"])
def test_other_protocols_are_declined_too(client: socket.socket, what: bytes) -> None:
    head = b"GET /%d HTTP/1.1\r\nConnection: keep-alive, upgrade\r\nUpgrade: %s\r\n\r\n"
    client.sendall(head % (1, what) + head % (2, what))
    assert [answer(client)["asked"] for _ in range(2)] == ["GET /1", "GET /2"]


def test_there_are_no_tunnels(client: socket.socket) -> None:
    client.sendall(b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n" + SMUGGLED)
    told = b"".join(iter(lambda: client.recv(65536), b""))
    assert told.startswith(b"HTTP/1.1 400 ")
    assert told.count(b"HTTP/1.1") == 1


def test_a_trailer_is_no_header(client: socket.socket) -> None:
    head = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    client.sendall(head + b"1\r\na\r\n0\r\nAuthorization: evil\r\nX: y\r\n\r\n")
    told = answer(client)
    assert told["body"] == "a"
    assert [name for name, _ in told["headers"]] == ["host", "transfer-encoding"]

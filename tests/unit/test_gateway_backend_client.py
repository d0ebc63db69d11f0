"""The gateway's requests to a backend, against a server of raw bytes."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prune_gateway import backend_client
from moe_prune_gateway.backend_client import (
    BackendClient,
    BackendResponse,
    Broken,
    Unreachable,
    UnsendableHeader,
)

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
BODY = bytes(range(256)) * 3
PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nX-A: 1\r\n\r\n%s" % (len(BODY), BODY)
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nx-a: 1\r\n\r\n" + b"".join(
    b"%x\r\n%s\r\n" % (size, BODY[start : start + size])
    for start, size in ((0, 1), (1, 300), (301, len(BODY) - 301))
)
CHUNKED += b"0\r\nX-Trailer: 1\r\n\r\n"
UNTIL_EOF = b"HTTP/1.0 200 OK\r\nX-A: 1\r\n\r\n" + BODY
EARLY = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"


@asynccontextmanager
async def backend(
    talk: Talk, read_timeout_s: float = 5
) -> AsyncIterator[BackendClient]:
    """A client of a server whose every connection is one call of ``talk``."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await talk(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    client = BackendClient(f"http://{host}:{port}/base/", 5, read_timeout_s)
    client.open()
    async with server:
        try:
            yield client
        finally:
            await client.close()


async def head_of(reader: asyncio.StreamReader) -> bytes:
    return await reader.readuntil(b"\r\n\r\n")


async def whole(response: BackendResponse) -> bytes:
    """Everything that is left of an answer."""
    found = bytearray()
    try:
        while not response.at_end:
            found += await response.read()
    finally:
        response.close()
    return bytes(found)


async def answer_to(
    pieces: list[bytes], method: str = "GET"
) -> tuple[int, dict[bytes, bytes], bytes]:
    """Status, headers and body of an answer that comes in these pieces."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head_of(reader)
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)

    async with backend(talk) as client:
        response = await client.request(method, b"/x")
        return response.status, dict(response.headers), await whole(response)


@pytest.mark.parametrize("raw", [PLAIN, CHUNKED, UNTIL_EOF, EARLY + EARLY + CHUNKED])
@settings(max_examples=30)
@given(cuts=st.lists(st.integers(0, 1100), max_size=12))
def test_it_does_not_matter_where_packets_end(raw: bytes, cuts: list[int]) -> None:
    places = [0, *sorted({min(cut, len(raw)) for cut in cuts}), len(raw)]
    pieces = [raw[start:end] for start, end in pairwise(places)]
    status, headers, body = asyncio.run(answer_to(pieces))
    assert (status, body) == (200, BODY)
    assert headers[b"x-a"] == b"1"
    assert not {b"x-trailer", b"link"} & headers.keys()


@pytest.mark.parametrize(
    ("raw", "method", "expected"),
    [
        (PLAIN, "GET", (200, BODY)),
        (CHUNKED, "POST", (200, BODY)),
        (UNTIL_EOF, "GET", (200, BODY)),
        (b"HTTP/1.1 204 No Content\r\n\r\n", "GET", (204, b"")),
        (b"HTTP/1.1 304 Same\r\nContent-Length: 9\r\n\r\n", "GET", (304, b"")),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", "HEAD", (200, b"")),
        (PLAIN.replace(b"X-A: 1", b"Connection: close"), "GET", (200, BODY)),
        # What comes after the end is part of no answer.
        (PLAIN + PLAIN, "GET", (200, BODY)),
        # It names a place; going there is for the client to decide.
        (
            b"HTTP/1.1 302 X\r\nLocation: /y\r\nContent-Length: 0\r\n\r\n",
            "GET",
            (302, b""),
        ),
        # Compressed bytes stay compressed.
        (PLAIN.replace(b"X-A: 1", b"Content-Encoding: gzip"), "GET", (200, BODY)),
    ],
)
def test_answers(raw: bytes, method: str, expected: tuple[int, bytes]) -> None:
    status, _, body = asyncio.run(answer_to([raw], method))
    assert (status, body) == expected


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"hello\r\n\r\n",
        PLAIN[:-1],
        CHUNKED[:-8],
        CHUNKED.replace(b"\r\n1\r\n", b"\r\nz\r\n"),
        PLAIN.replace(b"X-A: 1", b"Content-Length: 5"),
        PLAIN.replace(b"X-A: 1", b"Transfer-Encoding: chunked"),
        PLAIN.replace(b"X-A: 1", b"X-A: a\x00b"),
        PLAIN.replace(b"X-A: 1", b"X A: 1"),
        PLAIN.replace(b"200 OK", b"600 Odd"),
        PLAIN.replace(b"200 OK", b"099 Odd"),
        b"HTTP/1.1 101 Other\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nxx",
        b"HTTP/1.1 200 OK\r\nX-A: " + b"a" * 300_000,
        b"HTTP/1.1 200 OK\r\n" + b"X-A: aaaa\r\n" * 9000,
    ],
)
def test_answers_that_are_not_passed_on(raw: bytes) -> None:
    with pytest.raises(Broken):
        asyncio.run(answer_to([raw]))


SAMPLES = [PLAIN, CHUNKED, UNTIL_EOF, EARLY, b"\r\n", b"\x00", b"\xff", b"0" * 30]


@settings(max_examples=150)
@given(
    pieces=st.lists(
        st.one_of(
            st.binary(max_size=40),
            st.sampled_from(SAMPLES),
            st.tuples(
                st.sampled_from(SAMPLES), st.integers(0, 60), st.binary(max_size=4)
            ).map(lambda cut: cut[0][: cut[1]] + cut[2] + cut[0][cut[1] + 1 :]),
        ),
        max_size=4,
    )
)
def test_any_bytes_are_an_answer_or_broken(pieces: list[bytes]) -> None:
    try:
        status, headers, _ = asyncio.run(answer_to(pieces))
    except Broken:
        return
    assert 200 <= status < 600
    for name, value in headers.items():
        assert not set(name + value) & {0, 10, 13}


def test_a_bare_cr_in_a_header_splits_no_answer() -> None:
    raw = PLAIN.replace(b"X-A: 1", b"X-A: 1\rX-B: 2")
    try:
        _, headers, _ = asyncio.run(answer_to([raw]))
    except Broken:
        return
    assert all(b"\r" not in value for value in headers.values())


def test_what_is_sent_and_that_connections_are_kept() -> None:
    heads: list[bytes] = []
    connections = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        for _ in range(3):
            heads.append(await head_of(reader))
            if b"Content-Length: 4" in heads[-1]:
                assert await reader.readexactly(4) == b"body"
            writer.write(PLAIN.replace(b"X-A: 1", b"Set-Cookie: a=1"))

    async def ask() -> None:
        async with backend(talk) as client:
            headers = [(b"x-odd", "ü".encode()), (b"x-odd", b"2")]
            for path, body in ((b"/a?b=%20&c=+", b"body"), (b"/%2e%C3%A9//c", None)):
                found = await client.request("POST", path, headers, body)
                assert await whole(found) == BODY
            found = await client.request("GET", b"/d")
            assert await whole(found) == BODY
            netloc = client.url.removeprefix("http://").removesuffix("/base").encode()
        odd = b"x-odd: \xc3\xbc\r\nx-odd: 2\r\n"
        first = b"%s /base/%s HTTP/1.1\r\nHost: " + netloc + b"\r\n%s\r\n"
        assert heads == [
            first % (b"POST", b"a?b=%20&c=+", odd + b"Content-Length: 4\r\n"),
            first % (b"POST", b"%2e%C3%A9//c", odd + b"Content-Length: 0\r\n"),
            first % (b"GET", b"d", b""),
        ]
        assert connections == 1

    asyncio.run(ask())


def test_a_large_body_is_sent_whole() -> None:
    body = bytes(range(256)) * (8 * backend_client.LARGE_BODY_BYTES // 256)
    received = b""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal received
        assert b"Content-Length: %d\r\n" % len(body) in await head_of(reader)
        received = await reader.readexactly(len(body))
        writer.write(PLAIN)

    async def ask() -> None:
        async with backend(talk) as client:
            assert await whole(await client.request("POST", b"/", (), body)) == BODY

    asyncio.run(ask())
    assert received == body


def test_a_header_that_cannot_be_sent_as_it_is_is_named() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raise AssertionError("nothing should have been sent")

    async def ask() -> None:
        async with backend(talk) as client:
            with pytest.raises(UnsendableHeader, match="x-odd"):
                await client.request("GET", b"/", [(b"x-odd", b"\xff")])

    asyncio.run(ask())


@pytest.mark.parametrize("after", [b"", b"HTTP/1.1 408 Too late\r\n\r\n"])
def test_a_connection_that_ends_while_idle_is_not_used(after: bytes) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head_of(reader)
        writer.write(PLAIN)
        await asyncio.sleep(0.05)
        writer.write(after)  # and closes

    async def ask() -> None:
        async with backend(talk) as client:
            for _ in range(2):
                assert await whole(await client.request("POST", b"/")) == BODY
                await asyncio.sleep(0.2)

    asyncio.run(ask())


def test_an_idle_connection_is_closed_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_client, "KEEP_ALIVE_S", 0.1)
    ended = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head_of(reader)
        writer.write(PLAIN)
        assert await reader.read() == b""
        ended.set()

    async def ask() -> None:
        async with backend(talk) as client:
            assert await whole(await client.request("GET", b"/")) == BODY
            async with asyncio.timeout(5):
                await ended.wait()

    asyncio.run(ask())


@pytest.mark.parametrize("said", [b"", PLAIN[:20], PLAIN[:100], CHUNKED[:100]])
def test_silence(said: bytes) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head_of(reader)
        writer.write(said)
        await reader.read()

    async def ask() -> None:
        async with backend(talk, read_timeout_s=0.2) as client:
            with pytest.raises(TimeoutError):
                await whole(await client.request("GET", b"/"))

    asyncio.run(ask())


@pytest.mark.parametrize("drip", [b"HTTP/1.1 200 OK\r\nX-A: ", EARLY])
def test_a_head_that_only_drips_is_not_waited_for(
    drip: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head_of(reader)
        writer.write(drip)
        for _ in range(200):
            writer.write(drip if drip is EARLY else b"a")
            await writer.drain()
            await asyncio.sleep(0.02)

    async def ask() -> None:
        async with backend(talk, read_timeout_s=0.4) as client:
            client.connect_timeout_s = 0.1
            start = asyncio.get_running_loop().time()
            with pytest.raises(TimeoutError):
                await client.request("GET", b"/")
            assert asyncio.get_running_loop().time() - start < 2

    asyncio.run(ask())


def test_slow_is_not_silent() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head_of(reader)
        for start in range(0, len(PLAIN), 100):
            writer.write(PLAIN[start : start + 100])
            await asyncio.sleep(0.1)

    async def ask() -> None:
        async with backend(talk, read_timeout_s=0.4) as client:
            assert await whole(await client.request("GET", b"/")) == BODY

    asyncio.run(ask())


def test_a_backend_waits_for_a_client_that_does_not_read() -> None:
    size = 64 << 20
    sent = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await head_of(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
        piece = bytes(1 << 16)
        for _ in range(size // len(piece)):
            writer.write(piece)
            await writer.drain()
            sent += len(piece)

    async def ask() -> None:
        async with backend(talk, read_timeout_s=0.3) as client:
            response = await client.request("GET", b"/")
            await asyncio.sleep(0.8)  # longer than silence may be: it is ours, though
            assert sent < size / 2  # what the kernel's buffers hold, and no more
            assert len(await whole(response)) == size

    asyncio.run(ask())


def test_no_server() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raise AssertionError("nobody should have connected")

    async def ask() -> None:
        async with backend(talk) as gone:
            url = gone.url
        client = BackendClient(url, 5, 5)
        client.open()
        try:
            with pytest.raises(Unreachable):
                await client.request("GET", b"/")
        finally:
            await client.close()

    asyncio.run(ask())


def test_what_is_too_long_is_not_read() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(2):
            await head_of(reader)
            writer.write(PLAIN)

    async def ask() -> None:
        async with backend(talk) as client:
            assert await client.get("/", (), 5, len(BODY)) == (200, BODY)
            with pytest.raises(Broken, match="more than"):
                await client.get("/", (), 5, len(BODY) - 1)

    asyncio.run(ask())

"""The gateway's side of its connections to backends, against a server of raw bytes."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_prune_gateway import upstream
from moe_prune_gateway.upstream import Broken, Connection, Unreachable, Upstream

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
async def backend(talk: Talk) -> AsyncIterator[Upstream]:
    """A server whose every connection is one call of ``talk``."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await talk(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    found = Upstream(f"http://{host}:{port}/base/", 5)
    async with server:
        yield found
        found.close()


async def head_of(reader: asyncio.StreamReader) -> bytes:
    return await reader.readuntil(b"\r\n\r\n")


async def whole(connection: Connection) -> bytes:
    """Everything that is left of an answer."""
    found = b""
    while not connection.at_end:
        found += await connection.read()
    connection.release()
    return found


async def answer_to(raw: bytes, method: str = "GET") -> tuple[int, bytes, bool]:
    """Status and body of an answer of these bytes; whether its connection is kept."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head_of(reader)
        writer.write(raw)
        await writer.drain()

    async with backend(talk) as asked:
        connection = await asked.ask(method, b"/x", silence_s=5)
        kept_by_head = connection._keep
        return connection.status, await whole(connection), kept_by_head


@pytest.mark.parametrize("raw", [PLAIN, CHUNKED, UNTIL_EOF, EARLY + EARLY + CHUNKED])
@given(cuts=st.lists(st.integers(0, 1100), max_size=12))
def test_it_does_not_matter_where_packets_end(raw: bytes, cuts: list[int]) -> None:
    async def parse() -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        connection = Connection([])
        connection._begin("GET")
        places = [0, *sorted({min(cut, len(raw)) for cut in cuts}), len(raw)]
        for start, end in pairwise(places):
            connection.data_received(raw[start:end])
        if raw is UNTIL_EOF:
            assert not connection._ended
            connection.connection_lost(None)
        return connection.status, connection.headers, await connection.read()

    status, headers, body = asyncio.run(parse())
    assert (status, body) == (200, BODY)
    assert [value for name, value in headers if name == b"x-a"] == [b"1"]
    assert b"x-trailer" not in dict(headers)
    assert b"link" not in dict(headers)


@pytest.mark.parametrize(
    ("raw", "method", "expected"),
    [
        (PLAIN, "GET", (200, BODY, True)),
        (CHUNKED, "POST", (200, BODY, True)),
        (UNTIL_EOF, "GET", (200, BODY, False)),
        (b"HTTP/1.1 204 No Content\r\n\r\n", "GET", (204, b"", True)),
        (b"HTTP/1.1 304 Same\r\nContent-Length: 9\r\n\r\n", "GET", (304, b"", True)),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", "HEAD", (200, b"", False)),
        (PLAIN.replace(b"X-A: 1", b"Connection: close"), "GET", (200, BODY, False)),
        # What comes after the end is nobody's, and goes nowhere.
        (PLAIN + PLAIN, "GET", (200, BODY, False)),
    ],
)
def test_answers(raw: bytes, method: str, expected: tuple[int, bytes, bool]) -> None:
    assert asyncio.run(answer_to(raw, method)) == expected


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"hello\r\n\r\n",
        PLAIN[:-1],
        CHUNKED[:-2],
        CHUNKED.replace(b"\r\n1\r\n", b"\r\nz\r\n"),
        PLAIN.replace(b"X-A: 1", b"Content-Length: 5"),
        PLAIN.replace(b"X-A: 1", b"Transfer-Encoding: chunked"),
        b"HTTP/1.1 101 Other\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nxx",
        EARLY * 9000,
        b"HTTP/1.1 200 OK\r\nX-A: " + b"a" * (4 * upstream.HEAD_BYTES),
    ],
)
def test_answers_that_are_none(raw: bytes) -> None:
    with pytest.raises(Broken):
        asyncio.run(answer_to(raw))


def test_what_is_sent_and_that_connections_are_kept() -> None:
    heads: list[bytes] = []
    connections = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        for _ in range(3):
            heads.append(await head_of(reader))
            if b"content-length: 4" in heads[-1]:
                assert await reader.readexactly(4) == b"body"
            writer.write(PLAIN)

    async def ask() -> None:
        async with backend(talk) as asked:
            headers = [(b"x-odd", b"\xff"), (b"x-odd", b"2")]
            for path, body in ((b"/a?b=%20", b"body"), (b"/c", b""), (b"/d", None)):
                found = await asked.ask("POST", path, headers, body, silence_s=5)
                assert await whole(found) == BODY
            netloc = b"127.0.0.1:%d" % asked.port
        odd = b"x-odd: \xff\r\nx-odd: 2\r\n"
        first = b"POST /base/%s HTTP/1.1\r\nhost: " + netloc + b"\r\n" + odd
        assert heads == [
            first % b"a?b=%20" + b"content-length: 4\r\n\r\n",
            first % b"c" + b"content-length: 0\r\n\r\n",
            first % b"d" + b"\r\n",
        ]
        assert connections == 1

    asyncio.run(ask())


@pytest.mark.parametrize("after", [b"", b"HTTP/1.1 408 Too late\r\n\r\n"])
def test_a_connection_that_says_anything_while_idle_is_not_used(after: bytes) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head_of(reader)
        writer.write(PLAIN)
        await asyncio.sleep(0.05)
        writer.write(after)  # and closes

    async def ask() -> None:
        async with backend(talk) as asked:
            assert await whole(await asked.ask("GET", b"/", silence_s=5)) == BODY
            assert len(asked.idle) == 1
            await asyncio.sleep(0.2)
            assert asked.idle == []
            assert await whole(await asked.ask("GET", b"/", silence_s=5)) == BODY

    asyncio.run(ask())


def test_an_idle_connection_is_closed_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "KEEP_ALIVE_S", 0.1)
    ended = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head_of(reader)
        writer.write(PLAIN)
        assert await reader.read() == b""
        ended.set()

    async def ask() -> None:
        async with backend(talk) as asked:
            assert await whole(await asked.ask("GET", b"/", silence_s=5)) == BODY
            async with asyncio.timeout(5):
                await ended.wait()
            assert asked.idle == []

    asyncio.run(ask())


@pytest.mark.parametrize("said", [b"", PLAIN[:20], CHUNKED[:100]])
def test_silence(said: bytes) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head_of(reader)
        writer.write(said)
        await reader.read()

    async def ask() -> None:
        async with backend(talk) as asked:
            with pytest.raises(TimeoutError):
                await whole(await asked.ask("GET", b"/", silence_s=0.2))

    asyncio.run(ask())


def test_slow_is_not_silent() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head_of(reader)
        for start in range(0, len(PLAIN), 100):
            writer.write(PLAIN[start : start + 100])
            await asyncio.sleep(0.1)

    async def ask() -> None:
        async with backend(talk) as asked:
            assert await whole(await asked.ask("GET", b"/", silence_s=0.4)) == BODY

    asyncio.run(ask())


def test_a_backend_waits_for_who_does_not_read() -> None:
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
        async with backend(talk) as asked:
            connection = await asked.ask("GET", b"/", silence_s=0.3)
            await asyncio.sleep(0.8)  # longer than silence may be: it is ours, though
            assert sent < size / 2  # what the kernel's buffers hold, and no more
            assert connection._unread < 2 * upstream.UNREAD_BYTES
            assert len(await whole(connection)) == size

    asyncio.run(ask())


def test_nobody_there() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raise AssertionError("nobody should have come")

    async def ask() -> None:
        async with backend(talk) as asked:
            pass
        with pytest.raises(Unreachable):
            await asked.ask("GET", b"/", silence_s=5)

    asyncio.run(ask())


def test_what_is_too_long_is_not_fetched() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(2):
            await head_of(reader)
            writer.write(PLAIN)

    async def ask() -> None:
        async with backend(talk) as asked:
            assert await asked.fetch(b"/", (), 5, len(BODY)) == (200, BODY)
            with pytest.raises(Broken, match="more than"):
                await asked.fetch(b"/", (), 5, len(BODY) - 1)

    asyncio.run(ask())

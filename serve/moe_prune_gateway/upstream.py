"""Asking a backend: HTTP/1.1 over connections that are kept, parsed by httptools.

One stream of tokens is thousands of pieces of 200 bytes, so what a piece costs decides
what the gateway costs: see ADR 9 for why no general client stands here.
"""

import asyncio
import ssl
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import httptools

Header = tuple[bytes, bytes]

# vLLM closes idle connections after 5 s; one it is closing must not be used.
KEEP_ALIVE_S = 3
# No answer's status line and headers are longer.
HEAD_BYTES = 64 * 1024
# What has come and nobody has read yet; past this the backend has to wait.
UNREAD_BYTES = 256 * 1024
NO_BODY = {204, 304}


class Unreachable(Exception):
    """No connection could be made, so that nothing has been sent."""


class Broken(Exception):
    """The connection ended before the answer did, or the answer is no HTTP."""


class Upstream:
    """The connections to one address.

    Args:
        url: ``http://`` or ``https://``, perhaps with a path, to go before others.
        connect_timeout_s: Longest time to connect.
    """

    def __init__(self, url: str, connect_timeout_s: float) -> None:
        parts = urlsplit(url)
        secure = parts.scheme == "https"
        self.host = parts.hostname or ""
        self.port = parts.port or (443 if secure else 80)
        self.tls = ssl.create_default_context() if secure else None
        self.prefix = parts.path.rstrip("/").encode()
        self.netloc = parts.netloc.encode()
        self.connect_timeout_s = connect_timeout_s
        self.idle: list[Connection] = []

    async def ask(
        self,
        method: str,
        path: bytes,
        headers: Sequence[Header] = (),
        body: bytes | None = None,
        *,
        silence_s: float,
    ) -> "Connection":
        """Send a request and wait for the head of its answer.

        Args:
            method: GET, POST, …
            path: With the query, as it goes over the wire.
            headers: Without ``host`` and what frames the body.
            body: None: there is none, not even an empty one.
            silence_s: Longest time in which nothing comes, now and later on.

        Returns:
            The connection; its ``close`` or ``release`` must be called.

        Raises:
            Unreachable, Broken: As they say.
            TimeoutError: The backend was silent.
        """
        lines = [b"%s %s%s HTTP/1.1\r\n" % (method.encode(), self.prefix, path)]
        lines.append(b"host: %s\r\n" % self.netloc)
        lines += [b"%s: %s\r\n" % header for header in headers]
        if body is not None:
            lines.append(b"content-length: %d\r\n" % len(body))
        lines.append(b"\r\n")
        connection = await self._connected()
        try:
            await connection.ask(method, b"".join(lines), body or b"", silence_s)
        except BaseException:
            connection.close()
            raise
        return connection

    async def fetch(
        self, path: bytes, headers: Sequence[Header], timeout_s: float, most: int
    ) -> tuple[int, bytes]:
        """Status and body of a GET, of so many bytes at most.

        Raises:
            Unreachable, Broken: As they say, or it is larger.
            TimeoutError: All of it took longer.
        """
        async with asyncio.timeout(timeout_s):
            connection = await self.ask("GET", path, headers, silence_s=timeout_s)
            try:
                found = bytearray()
                while not connection.at_end:
                    found += await connection.read()
                    if len(found) > most:
                        raise Broken(f"more than {most} bytes")
            finally:
                connection.release()
        return connection.status, bytes(found)

    def close(self) -> None:
        """Close what is idle."""
        while self.idle:
            self.idle[-1].close()

    async def _connected(self) -> "Connection":
        if self.idle:
            return self.idle.pop()
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self.connect_timeout_s):
                _, connection = await loop.create_connection(
                    lambda: Connection(self.idle), self.host, self.port, ssl=self.tls
                )
        except OSError as error:  # a TimeoutError is one
            raise Unreachable(f"{type(error).__name__}: {error}") from error
        return connection


class Connection(asyncio.Protocol):
    """One connection, and the one answer that is on its way.

    Args:
        idle: Where it waits between two requests.
    """

    def __init__(self, idle: list["Connection"]) -> None:
        self.idle = idle
        self.loop = asyncio.get_running_loop()
        self.transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._begin("")
        self._ended = True  # nothing has been asked

    def _begin(self, method: str) -> None:
        self.status = 0
        self.headers: list[Header] = []
        self._method = method
        self._parser = httptools.HttpResponseParser(self)
        self._has_head = self._ended = self._keep = self._paused = False
        self._until_eof = False
        self._head_bytes = self._unread = 0
        self._parts: list[bytes] = []
        self._failure: Exception | None = None

    # --- what is asked of it --------------------------------------------------

    async def ask(
        self, method: str, head: bytes, body: bytes, silence_s: float
    ) -> None:
        """Send a request; ``status`` and ``headers`` are those of its answer then.

        Raises:
            Broken: It ends first, or what comes is no HTTP.
            TimeoutError: Nothing comes.
        """
        self._drop_timer()
        self._begin(method)
        self._silence_s, self._heard = silence_s, time.monotonic()
        self._timer = self.loop.call_later(silence_s, self._look)
        if self.transport is None:
            raise Broken("closed while idle")
        self.transport.writelines((head, body))
        while not self._has_head:
            await self._news()

    @property
    def at_end(self) -> bool:
        """Whether all of the answer has been read."""
        return self._ended and not self._parts

    async def read(self) -> bytes:
        """What has come since the last time, at least something; nothing: the end.

        Raises:
            Broken, TimeoutError: The rest will not come.
        """
        while not self._parts and not self._ended:
            await self._news()
        parts, self._parts, self._unread = self._parts, [], 0
        if self._paused and self.transport is not None:
            self._paused, self._heard = False, time.monotonic()
            self.transport.resume_reading()
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def release(self) -> None:
        """Keep it for the next request if its answer is complete, else close it."""
        if not (self.at_end and self._keep and self.transport):
            self.close()
            return
        self._drop_timer()
        self._timer = self.loop.call_later(KEEP_ALIVE_S, self.close)
        self.idle.append(self)

    def close(self) -> None:
        """At once; a backend whose answer is not complete sees that nobody waits."""
        self._drop_timer()
        if self in self.idle:
            self.idle.remove(self)
        if self.transport is not None:
            self.transport.abort()
            self.transport = None

    # --- what asyncio says ----------------------------------------------------

    def connection_made(self, transport: Any) -> None:  # uvloop's have no common base
        """Connected."""
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """More of the answer."""
        if self._ended:  # nobody asked for this
            self.close()
            return
        self._heard = time.monotonic()
        try:
            if not self._has_head:
                self._count_head(data)
            self._parser.feed_data(data)
        except (
            httptools.HttpParserError,
            httptools.HttpParserUpgrade,
            Broken,
        ) as error:
            self._fail(Broken(f"{type(error).__name__}: {error}"))
        if self._unread > UNREAD_BYTES and not self._paused and self.transport:
            self._paused = True
            self.transport.pause_reading()
        self._wake()

    def eof_received(self) -> None:
        """Nothing more will come; the transport closes itself, later than this."""
        if self._ended:  # until then it would be taken for the next request
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Closed, by either side."""
        if self._until_eof and exc is None:
            self._ended = True
        self._fail(Broken(str(exc or "closed")))
        self.close()

    # --- what the parser says -------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header, or one after the body, which nobody needs."""
        if not self._has_head:
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """The head is here, or one that says that another will come."""
        status = self._parser.get_status_code()
        if status < 200:
            self.headers.clear()
            return
        if self._ended:
            return
        if status > 599:
            raise Broken(f"status {status}")
        self.status, self._has_head = status, True
        names = {name for name, _ in self.headers}
        framed = bool(names & {b"content-length", b"transfer-encoding"})
        bare = self._method == "HEAD" or status in NO_BODY
        self._until_eof = not framed and not bare
        self._keep = self._parser.should_keep_alive()
        if self._method == "HEAD":  # the parser would wait for what is announced
            self._ended, self._keep = True, False

    def on_body(self, body: bytes) -> None:
        """Some of the body, without its framing."""
        if not self._ended:
            self._parts.append(body)
            self._unread += len(body)

    def on_message_begin(self) -> None:
        """An answer begins; it must be the first."""
        if self._ended:
            self._keep = False

    def on_message_complete(self) -> None:
        """The body has ended, or what was no answer yet."""
        self._ended = self._has_head

    # --- waiting --------------------------------------------------------------

    async def _news(self) -> None:
        """Until something has changed.

        Raises:
            Broken, TimeoutError: Nothing can change any more.
        """
        if self._failure is not None:
            raise self._failure
        self._waiter = self.loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, failure: Exception) -> None:
        self._failure = self._failure or failure
        self._keep = False
        self._wake()

    def _count_head(self, data: bytes) -> None:
        self._head_bytes += len(data)
        # The first bytes of a body may come with its head.
        if self._head_bytes > HEAD_BYTES and b"\r\n\r\n" not in data[:HEAD_BYTES]:
            raise Broken(f"a head of more than {HEAD_BYTES} bytes")

    def _look(self) -> None:
        """One timer for the whole answer, which looks when something came last."""
        quiet = 0.0 if self._paused else time.monotonic() - self._heard
        if quiet < self._silence_s:
            self._timer = self.loop.call_later(self._silence_s - quiet, self._look)
        elif not self._ended:
            self._fail(TimeoutError(f"nothing for {self._silence_s:g} s"))

    def _drop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

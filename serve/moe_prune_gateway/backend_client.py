"""Requests to one backend, by aiohttp, and which of its answers are passed on."""

import asyncio
import io
import re
from collections.abc import Sequence
from typing import NoReturn

import aiohttp
from multidict import CIMultiDict
from yarl import URL

Header = tuple[bytes, bytes]

# vLLM closes idle connections after 5 s; one it is closing must not be used.
KEEP_ALIVE_S = 3
# aiohttp writes larger bodies piece by piece where it is given a file.
LARGE_BODY_BYTES = 1 << 20
# aiohttp's defaults, which a backend's own headers have to pass.
AUTO_HEADERS = ("accept", "accept-encoding", "content-type", "user-agent")
FINAL_STATUSES = range(200, 600)
# RFC 9110, 5.5 and 5.6.2. aiohttp's parser takes more than that from servers.
NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
VALUE = re.compile(rb"[^\x00-\x08\x0a-\x1f\x7f]*")


class Unreachable(Exception):
    """No connection could be made, so that nothing has been sent."""


class Broken(Exception):
    """The connection ended before the answer did, or the answer is not valid HTTP."""


class UnsendableHeader(Exception):
    """A header of the client has bytes that are not UTF-8; names it."""


class BackendClient:
    """Sends requests to one backend; connections are kept for the next ones.

    Args:
        url: ``http://`` or ``https://``, perhaps with a path, to go before others.
        connect_timeout_s: Longest time to connect.
        read_timeout_s: Longest time for status line and headers to be complete, and
            longest silence after them.
    """

    def __init__(
        self, url: str, connect_timeout_s: float, read_timeout_s: float
    ) -> None:
        self.url = url.rstrip("/")
        self.connect_timeout_s = connect_timeout_s
        self.read_timeout_s = read_timeout_s
        self._session: aiohttp.ClientSession | None = None

    def open(self) -> None:
        """Called in the event loop, before the first request."""
        self._session = aiohttp.ClientSession(
            # aiohttp would queue requests beyond 100 connections.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
            # Cookies of one client's answer are not sent with another's request.
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(
                # aiohttp's default of 5 minutes would end long answers.
                total=None,
                connect=self.connect_timeout_s,
                sock_read=self.read_timeout_s,
            ),
            skip_auto_headers=AUTO_HEADERS,
            auto_decompress=False,
            trust_env=False,
        )

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()

    async def request(
        self,
        method: str,
        path: bytes,
        headers: Sequence[Header] = (),
        body: bytes | None = None,
    ) -> "BackendResponse":
        """Send a request and wait for status and headers of its answer.

        Args:
            method: GET, POST, …
            path: With the query, as it is sent.
            headers: Without ``host`` and what frames the body.
            body: None: no body.

        Returns:
            The answer, whose ``close`` has to be called.

        Raises:
            Unreachable: No connection could be made; nothing was sent.
            Broken: The answer is not valid HTTP, or its connection ended first.
            TimeoutError: The backend took too long.
            UnsendableHeader: Nothing was sent.
        """
        assert self._session is not None, "open() has not been called"
        data = (
            body if body is None or len(body) < LARGE_BODY_BYTES else io.BytesIO(body)
        )
        limit_s = self.connect_timeout_s + self.read_timeout_s
        try:
            # sock_read begins anew with every byte: headers could trickle in for ever.
            async with asyncio.timeout(limit_s):
                response = await self._session.request(
                    method,
                    # encoded: yarl would rewrite escapes; the path goes as received.
                    URL(self.url + path.decode("ascii"), encoded=True),
                    headers=_decoded(headers),
                    data=data,
                    # It could lead anywhere; the client gets it and decides.
                    allow_redirects=False,
                )
        except (aiohttp.ClientError, OSError) as error:
            _translate(error)
        return BackendResponse(response)

    async def get(
        self, path: str, headers: Sequence[Header], timeout_s: float, most: int
    ) -> tuple[int, bytes]:
        """Status and body of a GET, of so many bytes at most.

        Raises:
            Unreachable: No connection could be made.
            Broken: The answer is not valid HTTP, cut off, or larger.
            TimeoutError: All of it took longer.
        """
        async with asyncio.timeout(timeout_s):
            response = await self.request("GET", path.encode(), headers)
            try:
                found = bytearray()
                while not response.at_end:
                    found += await response.read()
                    if len(found) > most:
                        raise Broken(f"{path} has more than {most} bytes")
            finally:
                response.close()
        return response.status, bytes(found)


class BackendResponse:
    """An answer of which status and headers are here.

    Raises:
        Broken: They are none that can be passed on.
    """

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status
        self.headers = [(name.lower(), value) for name, value in response.raw_headers]
        """Names in lower case, values byte by byte."""
        try:
            _check(self.status, self.headers)
        except Broken:
            response.close()
            raise

    @property
    def at_end(self) -> bool:
        """Whether all of the body has been read."""
        return self._response.content.at_eof()

    async def read(self) -> bytes:
        """What has come since the last time, at least something; nothing: the end.

        Raises:
            Broken, TimeoutError: The rest will not come.
        """
        try:
            return await self._response.content.readany()
        except (aiohttp.ClientError, OSError) as error:
            _translate(error)

    def close(self) -> None:
        """Keep the connection if all has been read, else let the backend see it go."""
        self._response.close()


def _decoded(headers: Sequence[Header]) -> CIMultiDict[str]:
    """Headers as aiohttp takes them, which encodes them as UTF-8 again."""
    found: CIMultiDict[str] = CIMultiDict()
    for name, value in headers:
        try:
            found.add(name.decode("ascii"), value.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UnsendableHeader(name.decode("ascii", "replace")) from error
    return found


def _check(status: int, headers: Sequence[Header]) -> None:
    if status not in FINAL_STATUSES:
        raise Broken(f"status {status}")
    for name, value in headers:
        if not NAME.fullmatch(name) or not VALUE.fullmatch(value):
            raise Broken(f"a header that is not valid: {name[:50]!r}")


def _translate(error: Exception) -> NoReturn:
    """aiohttp's exceptions in terms of what is known to have been sent."""
    said = f"{type(error).__name__}: {error}"
    # Before TimeoutError, of which aiohttp's ConnectionTimeoutError is a kind.
    if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
        raise Unreachable(said) from error
    if isinstance(error, TimeoutError):
        raise TimeoutError(said) from error
    raise Broken(said) from error

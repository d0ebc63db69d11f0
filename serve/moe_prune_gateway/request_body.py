"""A request comes in: its body, bounded in size, time and sum."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import Receive, Scope

from .api_error import ApiError
from .settings import MIB


class ClientGone(Exception):
    """The client closed its connection; nobody is left to be answered."""


class BodyBudget:
    """All request bodies that are in memory.

    Args:
        largest: Bytes of one body.
        together: Bytes of all of them.
        timeout_s: Longest silence of a client that is sending.
    """

    def __init__(self, largest: int, together: int, timeout_s: float) -> None:
        self.largest = largest
        self.together = together
        self.timeout_s = timeout_s
        self.held = 0

    @contextmanager
    def holding(self) -> Iterator["RequestBody"]:
        """A body that counts until the end of the block, or until it is dropped."""
        body = RequestBody(self)
        try:
            yield body
        finally:
            body.drop()


class RequestBody:
    """The body of one request."""

    def __init__(self, bodies: BodyBudget) -> None:
        self._bodies = bodies
        self._counted = 0
        self.data = b""

    def drop(self) -> None:
        """Free the memory; what has been sent is not needed any more."""
        self._bodies.held -= self._counted
        self._counted = 0
        self.data = b""

    async def read(self, scope: Scope, receive: Receive) -> None:
        """Fill ``data``.

        Raises:
            ApiError: It is too large, too slow, or there are too many.
            ClientGone: The client did not send all of it.
        """
        self._check_announced(scope)
        parts: list[bytes] = []
        more = True
        while more:
            try:
                async with asyncio.timeout(self._bodies.timeout_s):
                    message = await receive()
            except TimeoutError:
                raise ApiError(
                    408,
                    "request_timeout",
                    f"Nothing of the body came for {self._bodies.timeout_s:g} s.",
                ) from None
            if message["type"] == "http.disconnect":
                raise ClientGone
            parts.append(message.get("body", b""))
            self._count(len(parts[-1]))
            more = message.get("more_body", False)
        self.data = parts[0] if len(parts) == 1 else b"".join(parts)

    def _check_announced(self, scope: Scope) -> None:
        """Refuse by the header already, so that nothing of it is read."""
        for name, value in scope["headers"]:
            if name == b"content-length" and int(value) > self._bodies.largest:
                raise self._too_large()

    def _count(self, size: int) -> None:
        self._counted += size
        self._bodies.held += size
        if self._counted > self._bodies.largest:
            raise self._too_large()
        if self._bodies.held > self._bodies.together:
            raise ApiError(
                429,
                "too_many_bodies",
                f"Requests of {self._bodies.together / MIB:g} MiB in all are being "
                "read; try again.",
                retry_after_s=1,
            )

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            "request_too_large",
            f"The body is larger than {self._bodies.largest / MIB:g} MiB, the most "
            "this gateway takes.",
        )

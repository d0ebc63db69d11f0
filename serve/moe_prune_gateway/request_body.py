"""Request bodies, bounded in size, time and sum."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import Message, Receive, Scope

from .api_error import ApiError
from .settings import MIB


class ClientGone(Exception):
    """The client closed its connection; no answer can reach it."""


class BodyBudget:
    """All request bodies that are in memory.

    Args:
        largest: Bytes of one body.
        total: Bytes of all of them.
        silence_s: Longest silence of a client that is sending.
        whole_s: Longest time for one whole body.
    """

    def __init__(
        self, largest: int, total: int, silence_s: float, whole_s: float
    ) -> None:
        self.largest = largest
        self.total = total
        self.silence_s = silence_s
        self.whole_s = whole_s
        self.held = 0

    @contextmanager
    def admit(self) -> Iterator["RequestBody"]:
        """A body that counts until the end of the block, or until it is released."""
        body = RequestBody(self)
        try:
            yield body
        finally:
            body.release()


class RequestBody:
    """The body of one request."""

    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self._counted = 0
        self.data = b""

    def release(self) -> None:
        """Free the memory; what has been sent is not needed any more."""
        self._budget.held -= self._counted
        self._counted = 0
        self.data = b""

    async def read(self, scope: Scope, receive: Receive) -> None:
        """Fill ``data``.

        Raises:
            ApiError: It is too large, too slow, or there are too many.
            ClientGone: The client did not send all of it.
        """
        self._check_announced(scope)
        whole_s = self._budget.whole_s
        try:
            async with asyncio.timeout(whole_s) as whole:
                self.data = await self._received(receive)
        except TimeoutError:
            # Raised elsewhere, not by this timer.
            if not whole.expired():
                raise
            raise _too_slow(f"The body was not complete after {whole_s:g} s.") from None

    async def _received(self, receive: Receive) -> bytes:
        received = bytearray()  # a list of small pieces would take forty times as much
        more = True
        while more:
            message = await self._next_message(receive)
            if message["type"] == "http.disconnect":
                raise ClientGone
            piece = message.get("body", b"")
            more = message.get("more_body", False)
            self._count(len(piece))
            # All in one piece, as is usual: bytes() of bytes copies nothing.
            if not received and not more:
                return bytes(piece)
            received += piece
        return bytes(received)

    async def _next_message(self, receive: Receive) -> Message:
        silence_s = self._budget.silence_s
        try:
            async with asyncio.timeout(silence_s) as silence:
                return await receive()
        except TimeoutError:
            if not silence.expired():
                raise
            raise _too_slow(f"Nothing of the body came for {silence_s:g} s.") from None

    def _check_announced(self, scope: Scope) -> None:
        """Refuse by the header already, so that nothing of it is read."""
        for name, value in scope["headers"]:
            # llhttp has refused what is no number.
            if name == b"content-length" and int(value) > self._budget.largest:
                raise self._too_large()

    def _count(self, size: int) -> None:
        # Before it is refused: release() gives back all that was counted.
        self._counted += size
        self._budget.held += size
        if self._counted > self._budget.largest:
            raise self._too_large()
        if self._budget.held > self._budget.total:
            raise ApiError(
                429,
                "too_many_bodies",
                f"Requests of {self._budget.total / MIB:g} MiB in all are being "
                "read; try again.",
                retry_after_s=1,
            )

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            "request_too_large",
            f"The body is larger than {self._budget.largest / MIB:g} MiB, the most "
            "this gateway takes.",
        )


def _too_slow(message: str) -> ApiError:
    return ApiError(408, "request_timeout", message)

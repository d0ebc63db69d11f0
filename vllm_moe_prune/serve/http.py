"""uvicorn's HTTP protocol with bounds on what a client can make it hold or wait for."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from .refusals import Refusal

# uvicorn bounds neither; a line and headers of real clients take 2 KiB.
HEAD_BYTES = 64 * 1024
HEAD_TIMEOUT_S = 15


class HeadTooLarge(Exception):
    """More header bytes than any client needs; the parser stops at it."""


def bounded_http(
    stall_timeout_s: float, head_timeout_s: float = HEAD_TIMEOUT_S
) -> type[HttpToolsProtocol]:
    """uvicorn's protocol, bounded.

    Args:
        stall_timeout_s: How long a client may leave an answer unread.
        head_timeout_s: How long a request's line and headers may take.
    """

    class BoundedHttp(HttpToolsProtocol):
        """Closes connections whose head is too large or too slow, or that stall."""

        head_bytes = 0
        unparsed_bytes = 0
        head_timer: asyncio.TimerHandle | None = None
        stall_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._await_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._head_is_here()
            self._writable()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            # The parser keeps a header until it is complete: count what it was given.
            if self.head_timer is not None and not self.transport.is_closing():
                self.unparsed_bytes += len(data)
                if self.unparsed_bytes > HEAD_BYTES:
                    self.send_400_response("")

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._await_head()

        def on_url(self, url: bytes) -> None:
            self._count(len(url))
            super().on_url(url)

        def on_header(self, name: bytes, value: bytes) -> None:
            self._count(len(name) + len(value))
            super().on_header(name, value)

        def on_headers_complete(self) -> None:
            self._head_is_here()
            super().on_headers_complete()

        def send_400_response(self, msg: str) -> None:
            refusal = Refusal(400, "invalid_http", msg)
            if max(self.head_bytes, self.unparsed_bytes) > HEAD_BYTES:
                limit = f"{HEAD_BYTES // 1024} KiB"
                message = f"Address and headers take more than {limit}."
                refusal = Refusal(431, "headers_too_large", message)
            body = refusal.body
            head = (
                b"content-type: application/json\r\ncontent-length: %d\r\n"
                b"connection: close\r\n\r\n" % len(body)
            )
            self.transport.write(STATUS_LINE[refusal.status] + head + body)
            self.transport.close()

        def pause_writing(self) -> None:
            super().pause_writing()
            self.stall_timer = self.loop.call_later(
                stall_timeout_s, self.transport.abort
            )

        def resume_writing(self) -> None:
            self._writable()
            super().resume_writing()

        def _count(self, size: int) -> None:
            self.head_bytes += size
            if self.head_bytes > HEAD_BYTES:
                raise HeadTooLarge  # which ends in send_400_response

        def _await_head(self) -> None:
            if self.head_timer is None:
                self.head_timer = self.loop.call_later(
                    head_timeout_s, self.transport.close
                )

        def _head_is_here(self) -> None:
            self.head_bytes = self.unparsed_bytes = 0
            if self.head_timer is not None:
                self.head_timer.cancel()
                self.head_timer = None

        def _writable(self) -> None:
            if self.stall_timer is not None:
                self.stall_timer.cancel()
                self.stall_timer = None

    return BoundedHttp

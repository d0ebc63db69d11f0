"""uvicorn's HTTP protocol with bounds on what a client can make it hold or wait for.

And with two of its ways set right: an offer to upgrade is declined without losing the
body, and what a client sends behind a body is no header.
"""

import asyncio
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from .api_error import ApiError

# uvicorn bounds neither; a line and headers of real clients take 2 KiB.
HEAD_BYTES = 64 * 1024
HEAD_TIMEOUT_S = 15
# Headers that are about an upgrade; Java's HttpClient sends both with every request.
UPGRADE = {b"upgrade", b"http2-settings"}


class HeadTooLarge(Exception):
    """More header bytes than any client needs; the parser stops at it."""


def bounded_protocol(
    stall_timeout_s: float, head_timeout_s: float = HEAD_TIMEOUT_S
) -> type[HttpToolsProtocol]:
    """uvicorn's protocol, bounded.

    Args:
        stall_timeout_s: How long a client may leave an answer unread.
        head_timeout_s: How long a request's line and headers may take.
    """

    class BoundedProtocol(HttpToolsProtocol):
        """Closes connections whose head is too large or too slow, or that stall."""

        head_bytes = 0
        unparsed_bytes = 0
        head_timer: asyncio.TimerHandle | None = None
        stall_timer: asyncio.TimerHandle | None = None
        declining = False

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._await_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._head_is_here()
            self._writable()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            self._unset_keepalive_if_required()
            size = len(data)
            try:
                # More than one turn only where an upgrade was declined.
                while data:
                    data = self._parsed(data)
            except httptools.HttpParserError:
                self.send_400_response("Invalid HTTP request received.")
                return
            # The parser keeps a header until it is complete: count what it was given.
            if self.head_timer is not None and not self.transport.is_closing():
                self.unparsed_bytes += size
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
            if self.head_timer is not None:  # else it is a trailer
                super().on_header(name, value)

        def on_headers_complete(self) -> None:
            self._head_is_here()
            # The parser takes what follows for another protocol; see _parsed.
            self.declining = self.parser.should_upgrade()
            if not self.declining:
                super().on_headers_complete()

        def on_message_complete(self) -> None:
            if not self.declining:
                super().on_message_complete()

        def send_400_response(self, msg: str) -> None:
            refusal = ApiError(400, "invalid_http", msg)
            if max(self.head_bytes, self.unparsed_bytes) > HEAD_BYTES:
                limit = f"{HEAD_BYTES // 1024} KiB"
                message = f"Address and headers take more than {limit}."
                refusal = ApiError(431, "headers_too_large", message)
            body = refusal.body
            head = (
                b"content-type: application/json\r\ncontent-length: %d\r\n"
                b"connection: close\r\n\r\n" % len(body)
            )
            self.transport.write(STATUS_LINE[refusal.status] + head + body)
            self.transport.close()

        def pause_writing(self) -> None:
            super().pause_writing()
            # abort, as close would wait for what the client does not read.
            self.stall_timer = self.loop.call_later(
                stall_timeout_s, self.transport.abort
            )

        def resume_writing(self) -> None:
            self._writable()
            super().resume_writing()

        def _parsed(self, data: bytes) -> bytes:
            """Give bytes to the parser; returns those that it has to be given again.

            A request that offers to upgrade is read as if it did not: RFC 9110, 7.8.
            """
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                head = self._head_without_upgrade()
                self.parser = httptools.HttpRequestParser(self)
                # As uvicorn sets up its own parser.
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
                return head + data[upgrade.args[0] :]
            return b""

        def _head_without_upgrade(self) -> bytes:
            """The request's line and headers again.

            Raises:
                httptools.HttpParserInvalidMethodError: It wants a tunnel.
            """
            method = self.parser.get_method()
            if method == b"CONNECT":
                raise httptools.HttpParserInvalidMethodError("no tunnels")
            version = self.parser.get_http_version().encode()
            lines = [b"%s %s HTTP/%s\r\n" % (method, self.url, version)]
            for name, value in self.headers:
                if name == b"connection":
                    options = [option.strip() for option in value.split(b",")]
                    value = b", ".join(o for o in options if o.lower() not in UPGRADE)
                if name not in UPGRADE:
                    lines.append(b"%s: %s\r\n" % (name, value))
            return b"".join(lines) + b"\r\n"

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

    return BoundedProtocol

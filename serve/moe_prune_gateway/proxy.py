"""The pass-through: a request goes to a backend, its answer comes back byte for byte.

No schema of the OpenAI API is known here. Where there is a choice of backends, the
request's ``model`` is read, and nothing else.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from urllib.parse import unquote

import msgspec
from starlette.types import Message, Receive, Scope, Send

from .api_error import (
    ApiError,
    backend_broken,
    backend_timeout,
    backend_unreachable,
    request_timeout,
    shutting_down,
)
from .backend_client import (
    BackendResponse,
    Broken,
    Header,
    Unreachable,
    UnsendableHeader,
)
from .backends import Backend, BackendPool
from .metrics import Metrics, path_label
from .one_line import one_line
from .page_routes import PLUGIN_PATH
from .request_body import BodyBudget, ClientGone, RequestBody
from .response_body import EventStream, PlainBody
from .settings import GatewaySettings

log = logging.getLogger(__name__)

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
"""What is passed on. TRACE echoes headers; OPTIONS is answered by the gateway."""
# Of one connection, not of the message: RFC 9110, 7.6.1.
HOP_BY_HOP = {
    *(b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization"),
    *(b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade"),
}
NOT_FORWARDED = HOP_BY_HOP | {b"host", b"content-length", b"expect"}
# uvicorn writes its own date.
NOT_RETURNED = HOP_BY_HOP | {b"date"}
# The gateway decides which web pages may read an answer.
CORS = b"access-control-"
# What a backend sends runs no scripts under the gateway's address.
SANDBOX = (b"content-security-policy", b"sandbox")
PLUGIN_DATA = {
    f"{PLUGIN_PATH}/{name}" for name in ("load", "remap", "provenance", "report")
}
# Without a body, these would lose their Content-Length: 0.
WITH_BODY = {"POST", "PUT"}
# Their answers have no body, whatever their headers announce.
NO_BODY = {204, 304}


class ReverseProxy:
    """An ASGI application for ``/v1/…`` and ``/backends/NAME/…``."""

    def __init__(
        self, settings: GatewaySettings, backends: BackendPool, metrics: Metrics
    ) -> None:
        self.settings = settings
        self.backends = backends
        self.metrics = metrics
        self.bodies = BodyBudget(
            settings.max_body_bytes,
            settings.max_held_bytes,
            settings.client_timeout_s,
            settings.body_timeout_s,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on, or answer with the error that prevents it."""
        request = ProxiedRequest(self, scope, send)
        try:
            with self.bodies.admit() as body:
                await request.run(receive, body)
        except ClientGone:
            request.count_error("client_gone")
        except ApiError as error:
            request.count_error(error.code)
            await request.send_error(error)
        except asyncio.CancelledError:  # the time to drain is over
            request.count_error("shutting_down")
            await request.send_error(shutting_down())
        finally:
            request.count()


class ProxiedRequest:
    """One request and its answer."""

    def __init__(self, proxy: ReverseProxy, scope: Scope, send: Send) -> None:
        self.proxy = proxy
        self.scope = scope
        self.send = send
        self.started = time.monotonic()
        self.backend: Backend | None = None
        self.path = b""
        self.status = 0
        self.streaming = False
        self.complete = False
        """The client has all it wants, and may leave."""

    async def run(self, receive: Receive, body: RequestBody) -> None:
        """Read the request, choose a backend, pass its answer on.

        Raises:
            ApiError: The gateway has to answer by itself.
            ClientGone: The client closed its connection.
        """
        name, self.path = backend_and_path(self.scope)
        if self.scope["method"] not in METHODS:
            raise ApiError(
                *(405, "method_not_allowed", "This method is not passed on."),
                headers={"Allow": ", ".join(METHODS)},
            )
        await body.read(self.scope, receive)
        candidates = self._candidates(name, body.data)
        limit_s = self.proxy.settings.request_timeout_s
        answering = asyncio.create_task(self._try_backends(candidates, body))
        # uvicorn reports that a client has gone only through receive().
        leaving = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait(
                (answering, leaving),
                timeout=limit_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if answering.done():
                answering.result()
            elif not leaving.done():
                raise request_timeout(limit_s)
            elif not self.complete:
                raise ClientGone
        finally:
            leaving.cancel()
            answering.cancel()
            # Waits until the connection to the backend is closed, so that vLLM aborts.
            await asyncio.gather(answering, leaving, return_exceptions=True)

    def _candidates(self, name: str | None, data: bytes) -> Sequence[Backend]:
        """Backends that the request may go to, the best first."""
        if name is not None:
            return [self.proxy.backends.named(name)]
        known = self.proxy.backends.all
        if len(known) == 1:
            return known
        headers = dict(self.scope["headers"])
        if b"json" not in headers.get(b"content-type", b""):
            raise ApiError(
                400,
                "model_required",
                "There are several backends and no JSON body that names a model; use "
                "/backends/NAME/v1/... instead.",
            )
        return self.proxy.backends.serving(model_of(data))

    async def _try_backends(
        self, candidates: Sequence[Backend], body: RequestBody
    ) -> None:
        """Try one backend after the other until one accepts a connection.

        One that refuses it was sent nothing, so trying the next is safe.
        """
        limit = self.proxy.settings.max_concurrent
        free = [backend for backend in candidates if backend.in_flight < limit]
        if not free:
            self.backend = candidates[0]
            raise ApiError(
                429,
                "too_many_requests",
                f"{limit} requests are in flight; try again.",
                retry_after_s=1,
            )
        for backend in free:
            self.backend = backend
            in_flight = self.proxy.metrics.in_flight.labels(backend.name)
            backend.in_flight += 1
            in_flight.inc()
            try:
                await self._forward(backend, body)
                return
            except Unreachable:
                self.proxy.backends.mark_down(backend)
            finally:
                backend.in_flight -= 1
                in_flight.dec()
        raise backend_unreachable(free[-1].name)

    async def _forward(self, backend: Backend, body: RequestBody) -> None:
        """Send the request to a backend and its answer to the client."""
        path = self.path
        if query := self.scope["query_string"]:
            path += b"?" + query
        method = self.scope["method"]
        data = body.data if body.data or method in WITH_BODY else None
        try:
            response = await backend.client.request(
                method, path, self._request_headers(), data
            )
            # The backend has it all: a long answer need not hold it in memory.
            del data
            body.release()
            try:
                await self._return(response)
            finally:
                response.close()
        except UnsendableHeader as error:
            raise ApiError(
                400, "invalid_http", f"Header {error} is not UTF-8; nothing was sent."
            ) from error
        except TimeoutError as error:
            raise backend_timeout(
                backend.name, backend.client.read_timeout_s
            ) from error
        except Broken as error:
            log.warning("backend %s: %s", backend.name, one_line(error))
            raise backend_broken(backend.name) from error

    async def _return(self, response: BackendResponse) -> None:
        headers = dict(response.headers)
        kind = headers.get(b"content-type", b"")
        encoded = b"content-encoding" in headers
        # Compressed events show no ends to cut at; they pass like any body.
        self.streaming = kind.startswith(b"text/event-stream") and not encoded
        body: EventStream | PlainBody = (
            EventStream()
            if self.streaming
            else PlainBody(is_json=b"json" in kind and not encoded)
        )
        self.status = response.status
        start: Message = {
            "type": "http.response.start",
            "status": response.status,
            "headers": _returned_headers(response),
        }
        await self.send(start)
        first, last = True, False
        try:
            while not last:
                piece = body.feed(await response.read())
                last = response.at_end
                self.complete = last or body.ended
                # The end is sent with the last piece: one system call less.
                if last:
                    piece += body.finish()
                if piece or last:
                    await self.send(_body_message(piece, not last))
                if piece and first:
                    first = False
                    self._observe_first_piece()
        finally:  # a client may leave as soon as it has read the end
            for token_kind, count in body.tokens().items():
                self.proxy.metrics.tokens.labels(self.label, token_kind).inc(count)

    def _request_headers(self) -> list[Header]:
        """The client's headers that are meant for the backend."""
        dropped = NOT_FORWARDED | _connection_options(self.scope["headers"])
        own = self.proxy.backends.authorization
        if self.proxy.settings.api_keys or own:
            dropped |= {b"authorization"}  # the key of this gateway goes no further
        sent = [header for header in self.scope["headers"] if header[0] not in dropped]
        return own + sent

    async def send_error(self, error: ApiError) -> None:
        """Answer in place of a backend, or end its answer so that this is seen."""
        if self.status == 0:
            self.status = error.status
            await error.response()(self.scope, _no_more_messages, self.send)
        elif self.streaming:
            await self.send(_body_message(error.sse_event, False))
        # Else uvicorn cuts the connection, as the answer is not complete.

    @property
    def label(self) -> str:
        """The backend in the metrics; empty where none was chosen."""
        return self.backend.name if self.backend else ""

    def _observe_first_piece(self) -> None:
        if not self.streaming:
            return
        elapsed = time.monotonic() - self.started
        self.proxy.metrics.first_token.labels(self.label).observe(elapsed)

    def count_error(self, code: str) -> None:
        """Count and log a request that failed here."""
        self.proxy.metrics.errors.labels(self.label, code).inc()
        log.info("%s %r: %s", self.scope["method"], self.scope["path"], code)

    def count(self) -> None:
        """The request has ended."""
        path = path_label(self.path.removeprefix(b"/v1/"))
        # 499 is what nginx logs for a client that left before an answer began.
        status = str(self.status or 499)
        self.proxy.metrics.requests.labels(self.label, path, status).inc()
        elapsed = time.monotonic() - self.started
        self.proxy.metrics.seconds.labels(self.label).observe(elapsed)


def backend_and_path(scope: Scope) -> tuple[str | None, bytes]:
    """The backend that an address names, if it does, and the path there, as received.

    Raises:
        ApiError: The path is none that goes to backends.
    """
    raw: bytes = scope["raw_path"]
    name = None
    if raw.startswith(b"/backends/"):
        # A trailing slash makes sure of four parts; rest[:-1] takes it off again.
        _, _, encoded, rest = (raw + b"/").split(b"/", 3)
        name, raw = unquote(encoded), b"/" + rest[:-1]
    # Decoded as a server may decode it, so that `..` leads nowhere else.
    segments = unquote(raw).split("/")
    inside = raw.startswith(b"/v1/") and not {".", ".."} & set(segments)
    if not inside and raw.decode("ascii") not in PLUGIN_DATA:
        raise ApiError(404, "not_found", "There is nothing at this address.")
    return name, raw


class _ModelField(msgspec.Struct):
    """What is read of a request; the rest is only checked to be JSON."""

    model: str


_decode_model = msgspec.json.Decoder(_ModelField).decode


def model_of(data: bytes) -> str:
    """The model that a JSON request asks for.

    Nothing else of the body is built: that could take twenty times its bytes.

    Raises:
        ApiError: It is no JSON, or names no model.
    """
    try:
        return _decode_model(data).model
    except msgspec.ValidationError:
        raise ApiError(
            400,
            "model_required",
            "There are several backends: 'model' must name a model; GET /v1/models "
            "lists them.",
        ) from None
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise ApiError(
            400, "invalid_json", "The body is not valid JSON; it was not sent on."
        ) from None


def _connection_options(headers: Sequence[Header]) -> set[bytes]:
    """Headers that a Connection header declares to be for its two ends only."""
    values = [value for name, value in headers if name == b"connection"]
    return {name.strip().lower() for value in values for name in value.split(b",")}


def _returned_headers(response: BackendResponse) -> list[Header]:
    """The headers of an answer that are meant for the client."""
    names = {name for name, _ in response.headers}
    dropped = NOT_RETURNED | _connection_options(response.headers)
    # uvicorn would wait for the body that is announced, or cut off a longer one.
    if response.status in NO_BODY or b"transfer-encoding" in names:
        dropped |= {b"content-length"}
    kept = [
        header
        for header in response.headers
        if header[0] not in dropped and not header[0].startswith(CORS)
    ]
    return [*kept, SANDBOX]


def _body_message(data: bytes, more: bool) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


async def _disconnected(receive: Receive) -> None:
    """Returns when the client is gone; its body has been read before."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _no_more_messages() -> Message:
    return {"type": "http.disconnect"}

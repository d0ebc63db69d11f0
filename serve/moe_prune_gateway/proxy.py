"""The pass-through: a request goes to a backend, its answer comes back byte for byte.

No schema of the OpenAI API is known here. Where there is a choice of backends, the one
thing read of a request is its model's name.
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
    shutting_down,
)
from .backends import Backend, BackendPool
from .metrics import Metrics, path_label
from .page_routes import PREFIX
from .request_body import BodyBudget, ClientGone, RequestBody
from .response_body import EventStream, PlainBody
from .settings import GatewaySettings
from .upstream import NO_BODY, Broken, Connection, Header, Unreachable

log = logging.getLogger(__name__)

# Of one connection, not of the message: RFC 9110, 7.6.1.
HOP_BY_HOP = {
    *(b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization"),
    *(b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade"),
}
NOT_FORWARDED = HOP_BY_HOP | {b"host", b"content-length", b"expect"}
NOT_RETURNED = HOP_BY_HOP | {b"date"}  # uvicorn writes its own
PLUGIN_DATA = {f"{PREFIX}/{name}" for name in ("load", "remap", "provenance", "report")}
# Without a body, these would lose the header that says so.
WITH_BODY = {"POST", "PUT"}


class ReverseProxy:
    """An ASGI application for ``/v1/…`` and ``/backends/NAME/…``."""

    def __init__(
        self, settings: GatewaySettings, backends: BackendPool, metrics: Metrics
    ) -> None:
        self.settings = settings
        self.backends = backends
        self.metrics = metrics
        self.bodies = BodyBudget(
            settings.max_body_bytes, settings.max_held_bytes, settings.client_timeout_s
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Carry out one request, or say why not."""
        exchange = ProxiedRequest(self, scope, send)
        try:
            with self.bodies.holding() as body:
                await exchange.run(receive, body)
        except ClientGone:
            exchange.failed("client_gone")
        except ApiError as refusal:
            exchange.failed(refusal.code)
            await exchange.refuse(refusal)
        except asyncio.CancelledError:  # the gateway was asked to end a while ago
            exchange.failed("shutting_down")
            await exchange.refuse(shutting_down())
        finally:
            exchange.count()


class ProxiedRequest:
    """One request and its answer."""

    def __init__(self, relay: ReverseProxy, scope: Scope, send: Send) -> None:
        self.relay = relay
        self.scope = scope
        self.send = send
        self.started = time.monotonic()
        self.backend: Backend | None = None
        self.path = b""
        self.status = 0
        self.streaming = False
        self.told_all = False
        """The client may leave: nothing it wants is still to come."""

    async def run(self, receive: Receive, body: RequestBody) -> None:
        """Read the request, choose a backend, pass on what it answers.

        Raises:
            ApiError: The gateway has to answer by itself.
            ClientGone: Nobody waits for the answer any more.
        """
        name, self.path = target(self.scope)
        await body.read(self.scope, receive)
        candidates = self._choose(name, body.data)
        answering = asyncio.create_task(self._answer(candidates, body))
        leaving = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait(
                (answering, leaving), return_when=asyncio.FIRST_COMPLETED
            )
            if answering.done():
                answering.result()
            elif not self.told_all:
                raise ClientGone
        finally:
            leaving.cancel()
            answering.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)

    def _choose(self, name: str | None, data: bytes) -> Sequence[Backend]:
        """Every backend that the request may go to, the best first."""
        if name is not None:
            return [self.relay.backends.named(name)]
        known = self.relay.backends.all
        if len(known) == 1:
            return known
        headers = dict(self.scope["headers"])
        if b"json" not in headers.get(b"content-type", b""):
            raise ApiError(
                400,
                "model_required",
                "There are several backends and no JSON body that names a model; ask "
                "/backends/NAME/v1/... instead.",
            )
        return self.relay.backends.serving(model_of(data))

    async def _answer(self, candidates: Sequence[Backend], body: RequestBody) -> None:
        """Ask one backend after the other until one accepts a connection.

        That it did not is known to leave nothing sent, so asking again is safe.
        """
        limit = self.relay.settings.max_concurrent
        free = [backend for backend in candidates if backend.in_flight < limit]
        if not free:
            self.backend = candidates[0]
            raise ApiError(
                429,
                "too_many_requests",
                f"{limit} requests are on their way; try again.",
                retry_after_s=1,
            )
        for backend in free:
            self.backend = backend
            in_flight = self.relay.metrics.in_flight.labels(backend.name)
            backend.in_flight += 1
            in_flight.inc()
            try:
                await self._ask(backend, body)
                return
            except Unreachable:
                self.relay.backends.mark_down(backend)
            finally:
                backend.in_flight -= 1
                in_flight.dec()
        raise backend_unreachable(free[-1].name)

    async def _ask(self, backend: Backend, body: RequestBody) -> None:
        """Send the request to a backend and its answer to the client."""
        path = self.path
        if query := self.scope["query_string"]:
            path += b"?" + query
        method = self.scope["method"]
        silence_s = self.relay.settings.read_timeout_s
        try:
            answer = await backend.upstream.ask(
                method,
                path,
                self._headers(),
                body.data if body.data or method in WITH_BODY else None,
                silence_s=silence_s,
            )
            try:
                body.drop()
                await self._pass_on(answer)
            finally:
                answer.release()
        except TimeoutError:
            raise backend_timeout(backend.name, silence_s) from None
        except Broken as error:
            log.warning("backend %s: %s", backend.name, error)
            raise backend_broken(backend.name) from error

    async def _pass_on(self, answer: Connection) -> None:
        told = dict(answer.headers)
        kind = told.get(b"content-type", b"")
        encoded = b"content-encoding" in told
        self.streaming = kind.startswith(b"text/event-stream") and not encoded
        is_json = b"json" in kind and not encoded
        length = told.get(b"content-length")
        pieces = (
            EventStream()
            if self.streaming
            else PlainBody(is_json, int(length) if length else None)
        )
        self.status = answer.status
        start: Message = {
            "type": "http.response.start",
            "status": answer.status,
            "headers": _returned(answer),
        }
        await self.send(start)
        first, last = True, False
        try:
            while not last:
                piece = pieces.feed(await answer.read())
                self.told_all = pieces.ended
                # The end comes with the last piece: one system call less per answer.
                if last := answer.at_end:
                    piece += pieces.finish()
                if piece or last:
                    await self.send(_body(piece, not last))
                if piece and first:
                    first = False
                    self._first_piece()
        finally:  # a client may leave as soon as it has read the end
            for token_kind, count in pieces.tokens().items():
                self.relay.metrics.tokens.labels(self.label, token_kind).inc(count)

    def _headers(self) -> list[Header]:
        """The client's headers that are meant for the backend."""
        dropped = NOT_FORWARDED | _named_by_connection(self.scope["headers"])
        own = self.relay.backends.authorization
        if self.relay.settings.api_keys or own:
            dropped |= {b"authorization"}  # the key of this gateway goes no further
        sent = [header for header in self.scope["headers"] if header[0] not in dropped]
        return own + sent

    async def refuse(self, refusal: ApiError) -> None:
        """Answer in place of a backend, or end its answer so that this is seen."""
        if self.status == 0:
            self.status = refusal.status
            await refusal.response()(self.scope, _nothing_more, self.send)
        elif self.streaming:
            await self.send(_body(refusal.event, False))
        # Else the connection is cut by uvicorn, as the answer is not complete.

    @property
    def label(self) -> str:
        """The backend in the metrics; none was chosen yet: empty."""
        return self.backend.name if self.backend else ""

    def _first_piece(self) -> None:
        if not self.streaming:
            return
        elapsed = time.monotonic() - self.started
        self.relay.metrics.first_token.labels(self.label).observe(elapsed)

    def failed(self, code: str) -> None:
        """Count and log what was not carried out."""
        self.relay.metrics.errors.labels(self.label, code).inc()
        log.info("%s %r: %s", self.scope["method"], self.scope["path"], code)

    def count(self) -> None:
        """The request has ended."""
        path = path_label(self.path.removeprefix(b"/v1/"))
        # 499 is what nginx logs for a client that left before an answer began.
        status = str(self.status or 499)
        self.relay.metrics.requests.labels(self.label, path, status).inc()
        elapsed = time.monotonic() - self.started
        self.relay.metrics.seconds.labels(self.label).observe(elapsed)


def target(scope: Scope) -> tuple[str | None, bytes]:
    """The backend an address names, if it does, and the path there, as it was sent.

    Raises:
        ApiError: The path is none that goes to backends.
    """
    raw: bytes = scope["raw_path"]
    name = None
    if raw.startswith(b"/backends/"):
        _, _, encoded, rest = (raw + b"/").split(b"/", 3)
        name, raw = unquote(encoded), b"/" + rest[:-1]
    # Looked at as a server may read it, so that `..` leads nowhere else.
    segments = unquote(raw).split("/")
    inside = raw.startswith(b"/v1/") and not {".", ".."} & set(segments)
    if not inside and raw.decode("ascii") not in PLUGIN_DATA:
        raise ApiError(404, "not_found", "There is nothing at this address.")
    return name, raw


class _Asked(msgspec.Struct):
    """What is read of a request; the rest is only checked to be JSON."""

    model: str


_READ = msgspec.json.Decoder(_Asked).decode


def model_of(data: bytes) -> str:
    """The model that a JSON request asks for.

    Nothing else is built of the body: that could take twenty times its bytes.

    Raises:
        ApiError: It is no JSON, or names no model.
    """
    try:
        return _READ(data).model
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


def _named_by_connection(headers: Sequence[Header]) -> set[bytes]:
    """Headers that a Connection header declares to be for its two ends only."""
    values = [value for name, value in headers if name == b"connection"]
    return {name.strip().lower() for value in values for name in value.split(b",")}


def _returned(answer: Connection) -> list[Header]:
    """The headers of an answer that are meant for the client."""
    dropped = NOT_RETURNED | _named_by_connection(answer.headers)
    if answer.status in NO_BODY:  # uvicorn would wait for what is announced
        dropped |= {b"content-length"}
    return [header for header in answer.headers if header[0] not in dropped]


def _body(data: bytes, more: bool) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


async def _disconnected(receive: Receive) -> None:
    """Returns when the client is gone; its body has been read before."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _nothing_more() -> Message:
    return {"type": "http.disconnect"}

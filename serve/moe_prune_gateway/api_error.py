"""Errors that the gateway itself answers with, in the form of the OpenAI API."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from starlette.responses import Response


@dataclass(eq=False)
class ApiError(Exception):
    """A request that fails in the gateway; raised anywhere, answered in one place.

    Attributes:
        status: HTTP status.
        code: What went wrong, for programs; also the label in the metrics.
        message: The same for people, with what to do about it.
        headers: Of the answer.
        retry_after_s: For the client, where trying again may help.
    """

    status: int
    code: str
    message: str
    retry_after_s: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def body(self) -> bytes:
        """The error object that OpenAI clients know."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        usual = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {
            "message": self.message,
            "type": kinds.get(self.status, usual),
            "param": "model" if self.code.startswith("model_") else None,
            "code": self.code,
        }
        return json.dumps({"error": error}).encode()

    @property
    def sse_event(self) -> bytes:
        """The same for a stream that has begun: its last server-sent event."""
        return b"data: " + self.body + b"\n\n"

    def response(self) -> Response:
        """The whole answer."""
        more = dict(self.headers)
        if self.retry_after_s is not None:
            more["Retry-After"] = str(self.retry_after_s)
        # RFC 9110, 15.5.2: a 401 must say how to authenticate.
        if self.status == 401:
            more["WWW-Authenticate"] = "Bearer"
        # The rest of the body is not awaited, and no request can follow before it.
        if self.status == 408:
            more["Connection"] = "close"
        return Response(self.body, self.status, more, "application/json")


def backend_unreachable(name: str) -> ApiError:
    """Nothing was sent to the backend: it does not accept connections."""
    return ApiError(
        503,
        "backend_unreachable",
        f"Backend {name!r} does not answer; try again when it is up.",
        retry_after_s=5,
    )


def backend_broken(name: str) -> ApiError:
    """The backend went away after it was sent the request."""
    return ApiError(
        502,
        "backend_broken",
        f"Backend {name!r} ended the connection before its answer was complete.",
    )


def backend_timeout(name: str, seconds: float) -> ApiError:
    """The backend sends nothing for too long."""
    return ApiError(
        504,
        "backend_timeout",
        f"Backend {name!r} sent nothing for {seconds:g} s.",
    )


def request_timeout(seconds: float) -> ApiError:
    """The backend is still answering after the longest time for one request."""
    return ApiError(
        504,
        "request_too_long",
        f"The answer was not complete after {seconds:g} s.",
    )


def shutting_down() -> ApiError:
    """The gateway is being stopped, and the time to drain is over."""
    return ApiError(503, "shutting_down", "The gateway is being stopped; try again.", 5)

"""What the gateway itself answers, in the words and form of the OpenAI API."""

import json
from dataclasses import dataclass

from starlette.responses import Response


@dataclass(eq=False)
class ApiError(Exception):
    """A request that is not carried out; raised anywhere, answered in one place.

    Attributes:
        status: HTTP status.
        code: What went wrong, for programs; also the label in the metrics.
        message: The same for people, with what to do about it.
        retry_after_s: Told to the client where trying again may help.
    """

    status: int
    code: str
    message: str
    retry_after_s: int | None = None

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
    def event(self) -> bytes:
        """The same for a stream that has begun: its last server-sent event."""
        return b"data: " + self.body + b"\n\n"

    def response(self, headers: dict[str, str] | None = None) -> Response:
        """The whole answer."""
        more = dict(headers or {})
        if self.retry_after_s is not None:
            more["Retry-After"] = str(self.retry_after_s)
        if self.status == 401:
            more["WWW-Authenticate"] = "Bearer"
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


def shutting_down() -> ApiError:
    """The gateway is being stopped and waited as long as it was told to."""
    return ApiError(503, "shutting_down", "The gateway is being stopped; try again.", 5)

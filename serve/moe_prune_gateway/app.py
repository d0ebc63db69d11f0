"""The gateway as a FastAPI application: our own routes, then the pass-through."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal, NoReturn

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from . import __version__
from .access import AccessGuard
from .api_error import ApiError
from .backends import BackendPool
from .metrics import Metrics
from .page_routes import INDEX, page_files, sender
from .proxy import METHODS, ReverseProxy
from .settings import GatewaySettings

OTHER_METHODS = ["POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "QUERY"]


class Health(BaseModel):
    """The gateway runs."""

    status: Literal["ok"] = "ok"


class BackendState(BaseModel):
    """One backend, as the pages show it."""

    name: str
    up: bool
    models: list[str]
    in_flight: int


class BackendList(BaseModel):
    """Every backend."""

    backends: list[BackendState]


class ErrorDetail(BaseModel):
    """What went wrong, in the form of the OpenAI API."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """Every error of the gateway."""

    error: ErrorDetail


def create_app(settings: GatewaySettings) -> FastAPI:
    """The application of some settings; it connects to backends when it is started."""
    metrics = Metrics()
    backends = BackendPool(
        settings.backends,
        metrics,
        settings.backend_api_key,
        settings.connect_timeout_s,
        settings.read_timeout_s,
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with backends.polling(settings.poll_s):
            yield

    closed: dict[int | str, dict[str, Any]] = {}
    if settings.api_keys:
        closed[401] = {"model": ErrorBody, "description": "No valid key"}
    # Its own documentation pages would load scripts from elsewhere.
    app = FastAPI(
        title="vllm-moe-prune gateway",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(Shortcut, proxy=ReverseProxy(settings, backends, metrics))
    pages = {f"/{path.name}": path for path in page_files()}
    pages["/"] = pages[f"/{INDEX}"]
    app.add_middleware(
        AccessGuard,
        settings=settings,
        pages=pages,
        refused=lambda code: metrics.errors.labels("", code).inc(),
    )
    # Last added is outermost: preflights are answered before a key is asked for.
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=METHODS,
            allow_headers=["*"],
            # Else scripts see only the headers that the Fetch standard calls safe.
            expose_headers=["Retry-After"],
        )
    app.add_exception_handler(HTTPException, _http_error)

    @app.get("/health")
    async def health() -> Health:
        """The gateway runs; backends are not polled for this."""
        return Health()

    @app.get("/ready", responses={503: {"model": BackendList}})
    async def ready() -> JSONResponse:
        """Whether there is a backend that requests can go to."""
        found = states(backends)
        status = 200 if any(one.up for one in found.backends) else 503
        return JSONResponse(found.model_dump(), status)

    @app.get("/metrics", response_class=Response, responses={200: METRICS_TEXT})
    async def show_metrics() -> Response:
        """Prometheus metrics."""
        return Response(
            generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST
        )

    @app.get("/backends", responses=closed)
    async def list_backends() -> BackendList:
        """The backends, and which models they serve."""
        return states(backends)

    @app.get("/v1/models", responses=closed, response_model=dict[str, Any])
    async def list_models() -> Response:
        """The models of all backends that are up, each as its backend lists it."""
        found = [model for one in backends.all if one.up for model in one.models or ()]
        data = b",".join(model.json for model in found)
        return _json(b'{"object":"list","data":[%s]}' % data)

    unknown: dict[int | str, dict[str, Any]] = {
        404: {"model": ErrorBody, "description": "No backend serves it"},
        503: {"model": ErrorBody, "description": "A backend has not been up yet"},
    }

    @app.get(
        "/v1/models/{model:path}",
        responses=closed | unknown,
        response_model=dict[str, Any],
    )
    async def show_model(model: str) -> Response:
        """One model, as its backend lists it."""
        backend = backends.serving(model)[0]
        # serving() raises unless a backend lists the model.
        return _json(next(m.json for m in backend.models or () if m.id == model))

    app.add_exception_handler(ApiError, _api_error)
    app.router.routes += [
        Route("/v1/models", _only_get, methods=OTHER_METHODS),
        Route("/v1/models/{model:path}", _only_get, methods=OTHER_METHODS),
    ]
    for address, path in pages.items():
        app.add_api_route(address, sender(path), include_in_schema=False)
    return app


class Shortcut:
    """Takes what is passed on past FastAPI, which would add a fifth to its cost.

    Args:
        app: Answers everything else.
        proxy: Passes requests on to backends.
    """

    def __init__(self, app: ASGIApp, proxy: ReverseProxy) -> None:
        self.app = app
        self.proxy = proxy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Choose by the path."""
        path = scope.get("path", "")
        models = path == "/v1/models" or path.startswith("/v1/models/")
        if path.startswith(("/v1/", "/backends/")) and not models:
            await self.proxy(scope, receive, send)
        else:
            await self.app(scope, receive, send)


METRICS_TEXT: dict[str, Any] = {"content": {CONTENT_TYPE_LATEST: {}}}


def states(backends: BackendPool) -> BackendList:
    """What is known of the backends now."""
    return BackendList(
        backends=[
            BackendState(
                name=one.name,
                up=one.up,
                models=one.model_ids,
                in_flight=one.in_flight,
            )
            for one in backends.all
        ]
    )


def _json(data: bytes) -> Response:
    return Response(data, media_type="application/json")


async def _only_get(request: Request) -> NoReturn:
    raise HTTPException(405, headers={"Allow": "GET"})


async def _http_error(request: Request, error: Exception) -> Response:
    """What Starlette raises for unknown paths and methods, as our other errors."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(
        error.status_code, "invalid_request"
    )
    headers = error.headers or {}
    return ApiError(
        error.status_code, code, f"{error.detail}.", headers=headers
    ).response()


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()

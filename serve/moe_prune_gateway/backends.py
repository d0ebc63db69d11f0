"""The vLLM servers behind the gateway: which are up, and which models they serve."""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from http import HTTPStatus

from pydantic import SecretStr

from .api_error import ApiError, backend_unreachable
from .backend_client import BackendClient, Broken, Header, Unreachable
from .backend_reports import (
    InvalidReport,
    ListedModel,
    ReportedProvenance,
    read_models,
    read_provenance,
)
from .background import BackgroundTasks
from .metrics import Metrics
from .one_line import one_line
from .page_routes import PLUGIN_PATH

log = logging.getLogger(__name__)

POLL_TIMEOUT_S = 5
MODELS_BYTES = 1 << 20
PROVENANCE_BYTES = 16 << 20
SHOWN = 20  # model names in an error
LEVEL = {True: logging.INFO, False: logging.WARNING}
# What a poll may meet; anything else is a fault of ours, logged with its traceback.
FAILURES = (Unreachable, Broken, TimeoutError, InvalidReport)


class Backend:
    """One vLLM server and what is known of it."""

    def __init__(self, name: str, client: BackendClient) -> None:
        self.name = name
        self.client = client
        self.up = False
        self.models: tuple[ListedModel, ...] | None = None
        """Kept while it is down. None: it was never up."""
        self.in_flight = 0
        self.polled = asyncio.Event()
        """Whether the first poll has ended, either way."""

    @property
    def model_ids(self) -> list[str]:
        """Names that requests can ask for."""
        return [model.id for model in self.models or ()]


class BackendPool:
    """All backends, each polled by a task of its own."""

    def __init__(
        self,
        addresses: Mapping[str, str],
        metrics: Metrics,
        api_key: SecretStr | None,
        connect_timeout_s: float,
        read_timeout_s: float,
    ) -> None:
        self.all = [
            Backend(name, BackendClient(url, connect_timeout_s, read_timeout_s))
            for name, url in addresses.items()
        ]
        self.metrics = metrics
        self.authorization: list[Header] = []
        if api_key is not None:
            key = api_key.get_secret_value().encode()
            self.authorization = [(b"authorization", b"Bearer " + key)]
        metrics.prepare(addresses)

    @asynccontextmanager
    async def polling(self, every_s: float) -> AsyncIterator[None]:
        """Poll all backends; begins when each has answered once or had the time to."""
        tasks = BackgroundTasks()
        try:
            for backend in self.all:
                backend.client.open()
                self._start_polling(tasks, backend, every_s)
            polled = [asyncio.create_task(one.polled.wait()) for one in self.all]
            _, pending = await asyncio.wait(polled, timeout=POLL_TIMEOUT_S)
            for task in pending:
                task.cancel()
            yield
        finally:
            await tasks.close()
            for backend in self.all:
                await backend.client.close()

    def _start_polling(
        self, tasks: BackgroundTasks, backend: Backend, every_s: float
    ) -> None:
        async def poll_forever() -> None:
            while True:
                await self._poll(backend)
                await asyncio.sleep(every_s)

        tasks.start(f"polling of backend {backend.name}", poll_forever)

    def named(self, name: str) -> Backend:
        """The backend of a name.

        Raises:
            ApiError: There is none.
        """
        for backend in self.all:
            if backend.name == name:
                return backend
        known = ", ".join(backend.name for backend in self.all)
        raise ApiError(
            404, "backend_not_found", f"No such backend; there are: {known}."
        )

    def serving(self, model: str) -> list[Backend]:
        """Backends that serve a model, the best choice first: up, then least busy.

        Raises:
            ApiError: No backend does, or one that may has not been up yet.
        """
        found = [backend for backend in self.all if model in backend.model_ids]
        if found:
            # Sorting is stable: of equals the first in the settings.
            return sorted(found, key=lambda one: (not one.up, one.in_flight))
        for backend in self.all:
            # It may serve the model: 503 says to try again, 404 would not.
            if backend.models is None:
                raise backend_unreachable(backend.name)
        names = sorted({name for each in self.all for name in each.model_ids})
        known = ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
        raise ApiError(
            404, "model_not_found", f"No backend serves this model; there are: {known}."
        )

    def mark_down(self, backend: Backend) -> None:
        """A connection was refused; until the next poll that succeeds."""
        self._set_up(backend, False, "refuses connections")

    async def _poll(self, backend: Backend) -> None:
        """Update whether a backend is up, and its models.

        No answer of a backend raises; only a fault of this code does.
        """
        why = "polling it failed"
        up = False
        try:
            await self._get(backend, "/health", MODELS_BYTES)
            body = await self._get(backend, "/v1/models", MODELS_BYTES)
            backend.models = read_models(body)
            up = True
        except FAILURES as error:
            why = f"{type(error).__name__}: {error}"
        finally:
            # Provenance is read when it comes back, perhaps with another checkpoint.
            returned = up and not backend.up
            self._set_up(backend, up, why)
            backend.polled.set()
        if returned:
            found = await self._provenance(backend)
            self.metrics.show_model(backend.name, found)

    async def _provenance(self, backend: Backend) -> ReportedProvenance | None:
        """The numbers of a pruned model; None: it has none that can be read."""
        path = f"{PLUGIN_PATH}/provenance"
        try:
            status, body = await self._fetch(backend, path, PROVENANCE_BYTES)
            return read_provenance(body) if status == HTTPStatus.OK else None
        except FAILURES as error:
            log.warning("backend %s: %s", backend.name, one_line(error))
            return None

    async def _get(self, backend: Backend, path: str, most: int) -> bytes:
        """The body of a GET that is no error.

        Raises:
            Unreachable, TimeoutError: There is no answer.
            Broken: It is not whole, or an error.
        """
        status, body = await self._fetch(backend, path, most)
        if status >= HTTPStatus.BAD_REQUEST:
            raise Broken(f"{path} is {status}")
        return body

    async def _fetch(self, backend: Backend, path: str, most: int) -> tuple[int, bytes]:
        return await backend.client.get(path, self.authorization, POLL_TIMEOUT_S, most)

    def _set_up(self, backend: Backend, up: bool, why: str) -> None:
        if backend.up != up:
            state = "up" if up else f"down: {one_line(why)}"
            log.log(LEVEL[up], "backend %s is %s", backend.name, state)
        backend.up = up
        self.metrics.up.labels(backend.name).set(up)

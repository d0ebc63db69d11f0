"""The vLLM servers behind the gateway: who is up, and who serves which model."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from pydantic import SecretStr

from .metrics import Metrics
from .refusals import Refusal, unreachable
from .site import PREFIX
from .upstream import Broken, Header, Unreachable, Upstream

log = logging.getLogger(__name__)

POLL_TIMEOUT_S = 5
# Of what a backend says about itself; a remap table's provenance is the longest.
LONGEST_BYTES = 16 << 20
LEVEL = {True: logging.INFO, False: logging.WARNING}


class Backend:
    """One vLLM server and what is known of it."""

    def __init__(self, name: str, upstream: Upstream) -> None:
        self.name = name
        self.upstream = upstream
        self.up = False
        self.models: list[Mapping[str, Any]] | None = None
        """As it lists them, word for word; kept while it is down. None: never up."""
        self.in_flight = 0

    @property
    def model_ids(self) -> list[str]:
        """Names that requests can ask for."""
        return [str(model.get("id")) for model in self.models or ()]


class Backends:
    """All of them. One task keeps watching each."""

    def __init__(
        self,
        addresses: Mapping[str, str],
        metrics: Metrics,
        api_key: SecretStr | None,
        connect_timeout_s: float,
    ) -> None:
        self.all = [
            Backend(name, Upstream(url, connect_timeout_s))
            for name, url in addresses.items()
        ]
        self.metrics = metrics
        self.authorization: list[Header] = []
        if api_key is not None:
            key = api_key.get_secret_value().encode()
            self.authorization = [(b"authorization", b"Bearer " + key)]
        metrics.prepare(addresses)

    @asynccontextmanager
    async def watched(self, every_s: float) -> AsyncIterator[None]:
        """Each is looked at regularly; in the end their connections are closed."""
        await self.look()
        watching = asyncio.create_task(self._watch(every_s))
        yield
        watching.cancel()
        for backend in self.all:
            backend.upstream.close()

    async def look(self) -> None:
        """Ask every backend once."""
        await asyncio.gather(*map(self._look_at, self.all))

    async def _watch(self, every_s: float) -> None:
        """Keep asking; a backend that hangs does not delay the others."""

        async def keep_looking(backend: Backend) -> None:
            while True:
                await asyncio.sleep(every_s)
                await self._look_at(backend)

        async with asyncio.TaskGroup() as group:
            for backend in self.all:
                group.create_task(keep_looking(backend))

    def named(self, name: str) -> Backend:
        """The backend of a name.

        Raises:
            Refusal: There is none.
        """
        for backend in self.all:
            if backend.name == name:
                return backend
        known = ", ".join(backend.name for backend in self.all)
        raise Refusal(404, "backend_not_found", f"No such backend; there are: {known}.")

    def serving(self, model: str) -> list[Backend]:
        """Who serves a model, the best choice first: up, then least busy.

        Raises:
            Refusal: Nobody does, or those that may are not up yet.
        """
        found = [backend for backend in self.all if model in backend.model_ids]
        if found:
            return sorted(found, key=lambda one: (not one.up, one.in_flight))
        for backend in self.all:
            if backend.models is None:
                raise unreachable(backend.name)
        known = ", ".join(sorted({name for b in self.all for name in b.model_ids}))
        raise Refusal(
            404, "model_not_found", f"No backend serves this model; there are: {known}."
        )

    def lost(self, backend: Backend) -> None:
        """A connection was refused; the watcher says when it is back."""
        self._note(backend, False, "refuses connections")

    async def _look_at(self, backend: Backend) -> None:
        try:
            await self._tell(backend, "/health")
            models = json.loads(await self._tell(backend, "/v1/models"))["data"]
            backend.models = [dict(model) for model in models]
        except (Unreachable, Broken, TimeoutError) as error:
            self._note(backend, False, f"{type(error).__name__}: {error}")
        except (ValueError, KeyError, TypeError, RecursionError):
            self._note(backend, False, "its /v1/models is no list of models")
        else:
            returned = not backend.up
            self._note(backend, True, "up")
            if returned:
                await self._show_model(backend)

    async def _show_model(self, backend: Backend) -> None:
        """Put into the metrics what pruning did to the model."""
        record: Any = None
        try:
            status, body = await self._get(backend, f"{PREFIX}/provenance")
            if status == 200:
                record = json.loads(body)
        except (Unreachable, Broken, TimeoutError, ValueError, RecursionError) as error:
            log.warning("backend %s: no provenance: %s", backend.name, error)
        self.metrics.show_model(
            backend.name, record if isinstance(record, dict) else None
        )

    async def _tell(self, backend: Backend, path: str) -> bytes:
        """The body of a GET that is no error.

        Raises:
            Unreachable, TimeoutError: There is no answer.
            Broken: It is not whole, or an error.
        """
        status, body = await self._get(backend, path)
        if status >= 400:
            raise Broken(f"{path} is {status}")
        return body

    async def _get(self, backend: Backend, path: str) -> tuple[int, bytes]:
        return await backend.upstream.fetch(
            path.encode(), self.authorization, POLL_TIMEOUT_S, LONGEST_BYTES
        )

    def _note(self, backend: Backend, up: bool, why: str) -> None:
        if backend.up != up:
            state = "up" if up else f"down: {why}"
            log.log(LEVEL[up], "backend %s is %s", backend.name, state)
        backend.up = up
        self.metrics.up.labels(backend.name).set(up)

"""The vLLM servers behind the gateway: who is up, and who serves which model."""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from pydantic import SecretStr

from .metrics import Metrics
from .refusals import Refusal, unreachable
from .site import PREFIX

log = logging.getLogger(__name__)

POLL_TIMEOUT_S = 5
# vLLM closes idle connections after 5 s; one it is closing must not be used.
KEEP_ALIVE_S = 3
LEVEL = {True: logging.INFO, False: logging.WARNING}


class Backend:
    """One vLLM server and what is known of it."""

    def __init__(self, name: str, url: str) -> None:
        self.name = name
        self.url = url
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
    ) -> None:
        self.all = [Backend(name, url) for name, url in addresses.items()]
        self.metrics = metrics
        self.authorization: dict[str, str] = {}
        if api_key is not None:
            key = api_key.get_secret_value()
            self.authorization = {"Authorization": f"Bearer {key}"}
        metrics.prepare(addresses)

    @asynccontextmanager
    async def watched(self, every_s: float) -> AsyncIterator[None]:
        """Connections to all of them are open, and each is looked at regularly."""
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
        async with aiohttp.ClientSession(
            connector=connector,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
        ) as self.session:
            await self.look()
            watching = asyncio.create_task(self._watch(every_s))
            yield
            watching.cancel()

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
        timeout = aiohttp.ClientTimeout(total=POLL_TIMEOUT_S)
        try:
            async with self._get(backend, "/health", timeout) as answer:
                answer.raise_for_status()
            async with self._get(backend, "/v1/models", timeout) as answer:
                answer.raise_for_status()
                models = (await answer.json(content_type=None))["data"]
            backend.models = [dict(model) for model in models]
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            self._note(backend, False, f"{type(error).__name__}: {error}")
        except (ValueError, KeyError, TypeError):
            self._note(backend, False, "its /v1/models is no list of models")
        else:
            returned = not backend.up
            self._note(backend, True, "up")
            if returned:
                await self._show_model(backend, timeout)

    async def _show_model(
        self, backend: Backend, timeout: aiohttp.ClientTimeout
    ) -> None:
        """Put into the metrics what pruning did to the model."""
        record: Any = None
        try:
            path = f"{PREFIX}/provenance"
            async with self._get(backend, path, timeout) as answer:
                if answer.status == 200:
                    record = await answer.json(content_type=None)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            log.warning("backend %s: no provenance: %s", backend.name, error)
        self.metrics.show_model(
            backend.name, record if isinstance(record, dict) else None
        )

    def _get(self, backend: Backend, path: str, timeout: aiohttp.ClientTimeout) -> Any:
        return self.session.get(
            backend.url + path,
            headers=self.authorization,
            timeout=timeout,
            allow_redirects=False,
        )

    def _note(self, backend: Backend, up: bool, why: str) -> None:
        if backend.up != up:
            state = "up" if up else f"down: {why}"
            log.log(LEVEL[up], "backend %s is %s", backend.name, state)
        backend.up = up
        self.metrics.up.labels(backend.name).set(up)

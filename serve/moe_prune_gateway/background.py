"""Tasks that run for as long as the gateway does."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import suppress

log = logging.getLogger(__name__)

RESTART_S = 1.0
Job = Callable[[], Coroutine[object, object, None]]


class BackgroundTasks:
    """Keeps jobs running: one that ends, however, is logged and started again."""

    def __init__(self, restart_s: float = RESTART_S) -> None:
        self.restart_s = restart_s
        # asyncio itself holds its tasks weakly.
        self._running: set[asyncio.Task[None]] = set()
        self._closing = False

    def start(self, name: str, job: Job) -> None:
        """Run a job that is not meant to end."""
        if self._closing:
            return
        task = asyncio.create_task(job(), name=name)
        self._running.add(task)
        task.add_done_callback(lambda ended: self._restart(ended, name, job))

    async def close(self) -> None:
        """Cancel all of them and wait until they have ended."""
        self._closing = True
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    def _restart(self, task: asyncio.Task[None], name: str, job: Job) -> None:
        self._running.discard(task)
        if self._closing:
            # Else asyncio logs that the exception was never retrieved.
            with suppress(asyncio.CancelledError):
                task.exception()
            return
        error = None if task.cancelled() else task.exception()
        log.error(
            "%s ended unexpectedly; it is started again in %g s",
            *(name, self.restart_s),
            exc_info=error,
        )
        asyncio.get_running_loop().call_later(self.restart_s, self.start, name, job)

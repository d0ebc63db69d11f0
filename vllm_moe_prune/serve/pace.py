"""With many streams tokens are passed on in groups: waking up for each costs too much.

A backend writes the tokens of one step to its connections one after the other. Waking
up for one of them takes ten times the processor time that it takes among others, and
takes it from the backend where both share cores. So once a token has been passed on,
the loop rests for a moment, and finds the others of the step together: what network
cards do with their interrupts.
"""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

MANY = 8
"""Streams on their way; with fewer, each token is passed on at once."""
REST_S = 0.002
"""Much less than the time between the tokens of a stream."""


class Pace:
    """When the event loop rests."""

    def __init__(self) -> None:
        self.streams = 0
        self._resting = False

    @contextmanager
    def stream(self) -> Iterator[None]:
        """One more, for as long as the block."""
        self.streams += 1
        try:
            yield
        finally:
            self.streams -= 1

    def passed(self) -> None:
        """Some of a stream has been passed on."""
        if self.streams >= MANY and not self._resting:
            self._resting = True
            asyncio.get_running_loop().call_soon(self._rest)

    def _rest(self) -> None:
        self._resting = False
        time.sleep(REST_S)  # the whole loop: nothing is to wake it up

"""Answer bodies: server-sent events are cut where they end, token counts are read."""

import json
import re
from typing import Any

# Past this an event is sent in parts; one of tokens is never that long.
LONGEST_EVENT = 1 << 20
# Larger answers are not kept to be read for their token counts.
LONGEST_KEPT = 1 << 20
# Larger counts are impossible, and a float could not hold them.
LARGEST_COUNT = 2**53
# In JSON text a quote would have a backslash, so this is a key.
USAGE = re.compile(rb'"usage":\s*\{')
END = re.compile(rb"\r?\n\r?\n")
LONGEST_END = 4
ENDS = (b"\n\n", b"\r\n\r\n")
DONE = b"data: [DONE]"


class EventStream:
    """Cuts a stream of bytes where events end, losing and adding none.

    A backend that dies inside an event then leaves the client with whole ones, after
    which an error can be sent. Each byte is looked at once, however it arrives.
    """

    def __init__(self) -> None:
        self._waiting = bytearray()
        """An event that is not complete."""
        self.usages: list[bytes] = []
        """The first and the last piece that have token counts in them: Anthropic's API
        reports those of the prompt first, and those of the answer last."""
        self.ended = False
        """Whether the event has passed after which no other comes."""

    def feed(self, data: bytes) -> bytes:
        """What can be sent now that these bytes have come."""
        whole = self._cut(data)
        if not whole:
            return whole
        if USAGE.search(whole):
            # Two at most: vLLM may report usage in every event.
            self.usages = [*self.usages[:1], whole]
        self.ended = self.ended or whole.rstrip().endswith(DONE)
        return whole

    def _cut(self, data: bytes) -> bytes:
        # An end may have begun in what waits; nothing before that has one.
        tail = bytes(self._waiting[1 - LONGEST_END :])
        seen = tail + data
        if seen.endswith(ENDS) or len(self._waiting) + len(data) > LONGEST_EVENT:
            at = len(data)
        else:
            at = max(0, _last_end(seen) - len(tail))
        if at == 0:
            self._waiting += data
            return b""
        whole = self.finish() + data[:at]
        self._waiting += data[at:]
        return whole

    def finish(self) -> bytes:
        """The rest, when the stream has ended as it should."""
        rest = bytes(self._waiting)
        self._waiting.clear()
        return rest

    def tokens(self) -> dict[str, int]:
        """Prompt and completion tokens that the stream reported, of each the last."""
        found: dict[str, int] = {}
        for piece in self.usages:
            for line in piece.splitlines():
                if line.startswith(b"data:") and USAGE.search(line):
                    found |= token_counts(line[5:])
        return found


class PlainBody:
    """An answer that is no stream: passed as it comes, and read for token counts."""

    ended = False

    def __init__(self, is_json: bool) -> None:
        self._kept: bytearray | None = bytearray() if is_json else None

    def feed(self, data: bytes) -> bytes:
        """The same bytes."""
        if self._kept is not None:
            self._kept += data
            if len(self._kept) > LONGEST_KEPT:
                self._kept = None
        return data

    def finish(self) -> bytes:
        """Nothing is ever held back."""
        return b""

    def tokens(self) -> dict[str, int]:
        """Prompt and completion tokens that the answer reports, if it does."""
        kept = self._kept or b""
        return token_counts(bytes(kept)) if USAGE.search(kept) else {}


def token_counts(data: bytes) -> dict[str, int]:
    """Token counts of one JSON answer, under the names that any of the APIs gives."""
    try:
        answer: Any = json.loads(data)
    except (ValueError, RecursionError):
        return {}  # not ours to judge: the client has these bytes
    # The last event of /v1/responses holds the answer, as the first of /v1/messages.
    holders = [answer, *(_field(answer, name) for name in ("response", "message"))]
    usages = [_field(holder, "usage") for holder in holders]
    usage = next((usage for usage in usages if isinstance(usage, dict)), {})
    names = {
        "prompt": ("prompt_tokens", "input_tokens"),
        "completion": ("completion_tokens", "output_tokens"),
    }
    found: dict[str, int] = {}
    for kind, keys in names.items():
        for key in keys:
            count = usage.get(key)
            # Not isinstance: JSON's true is an int to it.
            if type(count) is int and 0 <= count <= LARGEST_COUNT:
                found[kind] = count
                break
    return found


def _last_end(data: bytes) -> int:
    """Where the last event that is complete ends; 0: none is."""
    ends = [found.end() for found in END.finditer(data)]
    return ends[-1] if ends else 0


def _field(holder: Any, name: str) -> Any:
    return holder.get(name) if isinstance(holder, dict) else None

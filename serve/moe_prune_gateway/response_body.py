"""The answer goes out: server-sent events in whole, and what they say of tokens."""

import json
import re
from typing import Any

# Past this an event goes out in parts; nobody's tokens are that long.
LONGEST_EVENT = 1 << 20
# Larger answers are not kept to be read for their token counts.
LONGEST_KEPT = 1 << 20
# In JSON text a quote would have a backslash, so this is a key.
USAGE = re.compile(rb'"usage":\s*\{')
END = re.compile(rb"\r?\n\r?\n")


class EventStream:
    """Cuts a stream of bytes where events end, losing and adding none.

    A backend that dies inside an event then leaves the client with whole ones, after
    which an error can be told.
    """

    def __init__(self) -> None:
        self._rest = b""
        self.usages: list[bytes] = []
        """The first and the last piece that have token counts in them: Anthropic's API
        tells those of the prompt first, and those of the answer last."""
        self.ended = False
        """Whether the event has passed that says that no other will come."""

    def feed(self, data: bytes) -> bytes:
        """What can go out now that these bytes have come."""
        if self._rest:
            data = self._rest + data
        if data.endswith((b"\n\n", b"\r\n\r\n")) or len(data) > LONGEST_EVENT:
            whole, self._rest = data, b""
        else:
            ends = [found.end() for found in END.finditer(data)]
            cut = ends[-1] if ends else 0
            whole, self._rest = data[:cut], data[cut:]
        if USAGE.search(whole):
            self.usages = [*self.usages[:1], whole]
        self.ended = self.ended or whole.rstrip().endswith(b"data: [DONE]")
        return whole

    def finish(self) -> bytes:
        """What is left when the stream has ended as it should."""
        rest, self._rest = self._rest, b""
        return rest

    def tokens(self) -> dict[str, int]:
        """Prompt and completion tokens that the stream told; of each the last."""
        found: dict[str, int] = {}
        for piece in self.usages:
            for line in piece.splitlines():
                if line.startswith(b"data:") and USAGE.search(line):
                    found |= token_counts(line[5:])
        return found


class PlainBody:
    """An answer that is no stream: passed as it comes, and read once for tokens."""

    def __init__(self, is_json: bool, length: int | None = None) -> None:
        """Of an answer of so many bytes, if that is known."""
        self._kept: list[bytes] | None = [] if is_json else None
        self._size = 0
        self._length = length

    @property
    def ended(self) -> bool:
        """Whether all bytes have passed."""
        return self._size == self._length

    def feed(self, data: bytes) -> bytes:
        """The same bytes."""
        self._size += len(data)
        if self._size > LONGEST_KEPT:
            self._kept = None
        if self._kept is not None:
            self._kept.append(data)
        return data

    def finish(self) -> bytes:
        """Nothing is ever held back."""
        return b""

    def tokens(self) -> dict[str, int]:
        """Prompt and completion tokens that the answer tells, if it does."""
        data = b"".join(self._kept or ())
        return token_counts(data) if USAGE.search(data) else {}


def token_counts(data: bytes) -> dict[str, int]:
    """Token counts of one JSON answer; all APIs' names for them are known."""
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
            if isinstance(count := usage.get(key), int) and count >= 0:
                found[kind] = count
                break
    return found


def _field(holder: Any, name: str) -> Any:
    return holder.get(name) if isinstance(holder, dict) else None

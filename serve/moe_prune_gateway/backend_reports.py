"""Model lists and provenance of backends: untrusted, checked and bounded here only.

msgspec's decoder is strict where Python's is not: lone surrogates, ``NaN``, ``1e999``
and numbers of thousands of digits are errors.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

MAX_MODELS = 1000
MAX_ID_CHARACTERS = 256
MAX_DEPTH = 32
"""Of one entry of a model list; vLLM's have three levels."""
INTEGERS = range(-(2**63), 2**64)
"""What JSON readers of other languages can hold."""


class InvalidReport(Exception):
    """A report that is not used; the message is the reason, one line."""


@dataclass(frozen=True)
class ListedModel:
    """One entry of a backend's ``/v1/models``."""

    id: str
    json: bytes
    """The whole entry, valid JSON."""


Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class ReportedSparsity(msgspec.Struct):
    """What pruning removed or zeroed, of how much."""

    of_experts: Share | None = None
    of_all_parameters: Share | None = None
    parameters_before: Count | None = None
    parameters_after: Count | None = None


class ReportedProvenance(msgspec.Struct):
    """What is shown of a checkpoint's ``provenance.json``."""

    source_bytes: Count | None = None
    sparsity_achieved: ReportedSparsity | None = None


class _List(msgspec.Struct):
    data: list[dict[str, Any]]


_read_list = msgspec.json.Decoder(_List).decode
_read_provenance = msgspec.json.Decoder(ReportedProvenance).decode


def read_models(data: bytes) -> tuple[ListedModel, ...]:
    """The entries of a ``/v1/models``.

    Raises:
        InvalidReport: It is no such list, or one that could not be passed on to every
            client.
    """
    try:
        entries = _read_list(data).data
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidReport(f"its /v1/models cannot be read: {error}") from error
    if len(entries) > MAX_MODELS:
        raise InvalidReport(f"its /v1/models lists more than {MAX_MODELS} models")
    return tuple(_checked_model(entry) for entry in entries)


def read_provenance(data: bytes) -> ReportedProvenance:
    """The numbers of a ``provenance.json``.

    Raises:
        InvalidReport: They are none, or impossible.
    """
    try:
        return _read_provenance(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidReport(f"its provenance cannot be read: {error}") from error


def _checked_model(entry: dict[str, Any]) -> ListedModel:
    name = entry.get("id")
    if not isinstance(name, str) or not name.isprintable():
        raise InvalidReport("its /v1/models has an id that is no printable text")
    if not 0 < len(name) <= MAX_ID_CHARACTERS:
        raise InvalidReport(
            f"its /v1/models has an id of {len(name)} characters; 1 to "
            f"{MAX_ID_CHARACTERS} are allowed"
        )
    _check_json(entry)
    # Once here, not for every client that lists models.
    return ListedModel(name, msgspec.json.encode(entry))


def _check_json(entry: object) -> None:
    """Refuse nesting and integers that some client's JSON reader could not take."""
    # Level by level: the depth is counted, and nothing recurses.
    level: list[object] = [entry]
    for _ in range(MAX_DEPTH):
        inner: list[object] = []
        for value in level:
            if isinstance(value, dict):
                inner += value.values()
            elif isinstance(value, list):
                inner += value
            elif isinstance(value, int) and value not in INTEGERS:
                raise InvalidReport("its /v1/models has an integer beyond 64 bits")
        if not inner:
            return
        level = inner
    raise InvalidReport(f"its /v1/models is nested deeper than {MAX_DEPTH} levels")

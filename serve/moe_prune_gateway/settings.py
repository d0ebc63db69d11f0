"""Settings: flags, ``MOE_PRUNE_*`` variables, a file of keys."""

import os
import re
import reprlib
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from .gateway_error import GatewayError

PREFIX = "MOE_PRUNE_"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
MIB = 2**20
ORIGIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?#@\s]+")

Seconds = Annotated[float, Field(gt=0, le=7 * 24 * 3600, allow_inf_nan=False)]
LOCAL_NAMES = frozenset({"localhost"})


class GatewaySettings(BaseSettings):
    """Everything that can be set; flags win over variables."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="ignore", frozen=True)

    # NoDecode: pydantic-settings would take such variables for JSON.
    backends: Annotated[dict[str, str], NoDecode] = {}
    """Name → address; as a variable ``NAME=URL,NAME=URL``."""
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = ()
    """Any of them opens the gateway; none: it is open. A variable, never a flag:
    command lines can be read by every user of a machine."""
    api_key_file: Path | None = None
    """One more key per line."""
    backend_api_key: SecretStr | None = None
    """What vLLM servers were given as ``--api-key``."""
    allowed_origins: Annotated[tuple[str, ...], NoDecode] = ()
    """Other servers whose pages may use this gateway, as ``https://host``; ``*``: any,
    which needs keys. Pages of the gateway itself always may."""
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = ()
    """Names that requests may reach the gateway by. None: any, or on a loopback address
    ``localhost``. Addresses are always allowed."""
    max_body_mib: Annotated[int, Field(gt=0, le=4096)] = 32
    max_concurrent: Annotated[int, Field(gt=0, le=1_000_000)] = 1024
    """In-flight requests of a backend; more are answered 429."""
    connect_timeout_s: Seconds = 5
    read_timeout_s: Seconds = 600
    """Longest time until a backend's status and headers are complete, and longest
    silence after that."""
    client_timeout_s: Seconds = 60
    """Longest silence of a client while it sends, or while it does not read."""
    body_timeout_s: Seconds = 300
    """Longest time for a client to send a whole body."""
    request_timeout_s: Seconds = 4 * 3600
    """Longest time from a body's end to the end of the answer."""
    poll_s: Seconds = 2
    drain_s: Annotated[int, Field(ge=0, le=86400)] = 30
    """Time for in-flight requests after SIGTERM."""

    @field_validator("backends", mode="before")
    @classmethod
    def _split_backends(cls, value: object) -> object:
        if isinstance(value, str):
            return parse_backends([part for part in value.split(",") if part.strip()])
        return value

    @field_validator("backends")
    @classmethod
    def _check_backends(cls, value: dict[str, str]) -> dict[str, str]:
        return {name: _checked_backend(name, url) for name, url in value.items()}

    @field_validator("api_keys", "allowed_origins", "allowed_hosts", mode="before")
    @classmethod
    def _split_list(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("allowed_origins")
    @classmethod
    def _check_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if origin != "*" and not ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"{origin!r} is not an origin such as https://host:port"
                )
        return value

    @field_validator("backend_api_key", mode="before")
    @classmethod
    def _check_key(cls, value: object) -> object:
        if isinstance(value, str):
            value = value.strip() or None
            if value and not (value.isascii() and value.isprintable()):
                raise ValueError("a key is one line of printable ASCII characters")
        return value

    @property
    def host_names(self) -> frozenset[str] | None:
        """Names that a Host header may have, in lower case; None: any."""
        names = {name.lower() for name in self.allowed_hosts}
        if self.is_local:
            return frozenset(names | LOCAL_NAMES)
        return frozenset(names) if names else None

    @property
    def is_local(self) -> bool:
        """Whether it listens for programs of this machine only."""
        return (
            self.host == "::1"
            or self.host in LOCAL_NAMES
            or self.host.startswith("127.")
        )

    @property
    def max_body_bytes(self) -> int:
        """The largest request body."""
        return self.max_body_mib * MIB

    @property
    def max_held_bytes(self) -> int:
        """All request bodies that are in memory at one time."""
        return 16 * self.max_body_bytes


def load_settings(flags: Mapping[str, Any]) -> GatewaySettings:
    """Settings from flags, then variables, then defaults.

    Args:
        flags: Field name → value; None where a flag was not given.

    Raises:
        GatewayError: A value is refused, or the file of keys cannot be read.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        settings = GatewaySettings(**given)
    except ValidationError as error:
        raise GatewayError(f"gateway: {_first_problem(error)}") from error
    if not settings.backends:
        raise GatewayError(
            "gateway: no backend; give --backend NAME=URL for every vLLM server, or "
            f"set {PREFIX}BACKENDS."
        )
    settings = _with_keys_of_file(settings)
    if "*" in settings.allowed_origins and not settings.api_keys:
        raise GatewayError(
            f"gateway: {PREFIX}ALLOWED_ORIGINS=* lets every web page use the gateway; "
            f"set {PREFIX}API_KEYS too, or name the origins."
        )
    return settings


def _with_keys_of_file(settings: GatewaySettings) -> GatewaySettings:
    if settings.api_key_file is None:
        return settings
    lines = _read_keys(settings.api_key_file).splitlines()
    keys = tuple(SecretStr(line.strip()) for line in lines if line.strip())
    if not keys:
        raise GatewayError(f"{settings.api_key_file}: no key in it; one per line.")
    return settings.model_copy(update={"api_keys": settings.api_keys + keys})


def _read_keys(path: Path) -> str:
    """The text of a regular file of at most ``MIB`` bytes.

    Raises:
        GatewayError: It is something else.
    """
    try:
        # Opening a FIFO would wait for its writer.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as error:
        raise GatewayError(f"{path}: {error.strerror}.") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise GatewayError(f"{path}: is not a regular file with one key per line.")
    with os.fdopen(fd, "rb") as file:
        # One byte more tells a file that is too large from one that just fits.
        data = file.read(MIB + 1)
    if len(data) > MIB:
        raise GatewayError(f"{path}: is larger than 1 MiB, too large for keys.")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise GatewayError(
            f"{path}: byte {error.start} is not UTF-8; a text file with one key per "
            "line is needed."
        ) from error


def _first_problem(error: ValidationError) -> str:
    """What pydantic found first: which setting, what is wrong, what was given."""
    problem = error.errors()[0]
    place = ".".join(str(part) for part in problem["loc"])
    said = problem["msg"].removeprefix("Value error, ")
    # Our own validators name the value themselves, except for keys.
    if problem["type"] == "value_error":
        return f"{place}: {said}"
    return f"{place}: {said} (got {reprlib.repr(problem['input'])})"


def parse_backends(items: list[str]) -> dict[str, str]:
    """``NAME=URL`` items as a mapping.

    Raises:
        GatewayError: An item is something else, or a name comes twice.
    """
    backends: dict[str, str] = {}
    for item in items:
        name, equals, url = item.strip().partition("=")
        if not equals:
            raise GatewayError(
                f"backend {item!r} is not NAME=URL, e.g. pruned=http://127.0.0.1:8000"
            )
        if name in backends:
            raise GatewayError(f"two backends are called {name!r}; rename one.")
        backends[name] = url
    return backends


def _checked_backend(name: str, url: str) -> str:
    """The address without a slash at its end, nor the ``/v1`` clients are given."""
    if not NAME.fullmatch(name):
        raise ValueError(f"name {name!r} may only have letters, digits and . _ -")
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError(f"{name}: {url!r} is not an http:// or https:// address")
    try:
        # urlsplit checks a port only when asked for it.
        _ = parts.port
    except ValueError:
        raise ValueError(f"{name}: {url!r} has a port that is none") from None
    if parts.query or parts.fragment or parts.username or parts.password:
        raise ValueError(f"{name}: leave out user, query and fragment of the address")
    return url.rstrip("/").removesuffix("/v1")

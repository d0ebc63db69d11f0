"""Who may use the gateway: Host, Origin and key of every request."""

import hashlib
import hmac
import re
from collections.abc import Callable, Iterable, Sequence
from ipaddress import ip_address

from pydantic import SecretStr
from starlette.types import ASGIApp, Receive, Scope, Send

from .api_error import ApiError
from .settings import GatewaySettings

OPEN = {"/health", "/ready", "/metrics", "/openapi.json"}
# A registered name, IPv4 or IPv6 address, perhaps with a port: RFC 3986, 3.2.
HOST = re.compile(r"([A-Za-z0-9._~%!$&'()*+,;=-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]*)?")
Headers = Sequence[tuple[bytes, bytes]]


class AccessGuard:
    """Lets requests pass that may use the gateway; answers the others.

    Args:
        app: What is guarded.
        settings: Keys, and the hosts and origins that are allowed.
        pages: Addresses of files without data, for which no key is needed, as a browser
            cannot send one with an address.
        refused: Called with the code of every error.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: GatewaySettings,
        pages: Iterable[str],
        refused: Callable[[str], None],
    ) -> None:
        self.app = app
        self.refused = refused
        self.hosts = settings.host_names
        self.origins = {origin.lower() for origin in settings.allowed_origins}
        # Digests are of one length: comparing them does not tell the key's length.
        self.keys = [_digest(_bytes(key)) for key in settings.api_keys]
        self.open = OPEN | set(pages)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check, then pass on."""
        if scope["type"] == "http":
            try:
                self._check(scope)
            except ApiError as error:
                self.refused(error.code)
                await error.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        """Refuse what may not pass.

        Raises:
            ApiError: It says why.
        """
        host = _host(scope)
        if self.hosts is not None and host is not None:
            self._check_host(host)
        self._check_origin(scope["headers"], host)
        if self.keys and scope["path"] not in self.open:
            self._check_key(scope["headers"])

    def _check_host(self, host: str) -> None:
        """A web page can give its own name this machine's address, but no other."""
        assert self.hosts is not None
        # IPv6 addresses have colons too, but end with a bracket.
        name = host.rpartition(":")[0] if re.search(r":[0-9]*$", host) else host
        if name.lower() not in self.hosts and not _is_address(name):
            raise ApiError(
                403,
                "host_not_allowed",
                "This gateway is not reached by that name; MOE_PRUNE_ALLOWED_HOSTS "
                "lists those that are allowed.",
            )

    def _check_origin(self, headers: Headers, host: str | None) -> None:
        """A web page may use its own server only, or one that allows it."""
        for value in _values(headers, b"origin"):
            origin = value.decode("latin-1").lower()
            # Without the scheme: behind a proxy that ends TLS the two differ.
            own = host is not None and origin.partition("://")[2] == host.lower()
            if not own and not {origin, "*"} & self.origins:
                raise ApiError(
                    403,
                    "origin_not_allowed",
                    "Pages of other servers may not use this gateway; "
                    "MOE_PRUNE_ALLOWED_ORIGINS lists those that may.",
                )

    def _check_key(self, headers: Headers) -> None:
        given = _values(headers, b"authorization")
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"",) * 3
        digest = _digest(key.strip())
        # Every key is compared, so the time does not depend on which one came close.
        same = [hmac.compare_digest(digest, known) for known in self.keys]
        if scheme.lower() != b"bearer" or not any(same):
            raise ApiError(
                401,
                "invalid_api_key",
                "A key of this gateway is needed: Authorization: Bearer KEY.",
            )


def _host(scope: Scope) -> str | None:
    """The one Host header; None in HTTP/1.0, which may have none.

    Raises:
        ApiError: There is none, more than one, or one that is not valid: RFC 9112, 3.2.
    """
    given = _values(scope["headers"], b"host")
    if not given and scope["http_version"] == "1.0":
        return None
    host = given[0].decode("latin-1") if len(given) == 1 else ""
    if not HOST.fullmatch(host):
        raise ApiError(400, "invalid_http", "One valid Host header is needed.")
    return host


def _values(headers: Headers, wanted: bytes) -> list[bytes]:
    return [value for name, value in headers if name == wanted]


def _is_address(name: str) -> bool:
    try:
        ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def _bytes(key: SecretStr) -> bytes:
    return key.get_secret_value().encode()


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()

"""API keys: who may pass. Keys are kept and compared as digests, never logged."""

import hashlib
import hmac
from collections.abc import Callable, Iterable

from pydantic import SecretStr
from starlette.types import ASGIApp, Receive, Scope, Send

from .api_error import ApiError

OPEN = {"/health", "/ready", "/metrics", "/openapi.json"}


class AccessGuard:
    """Lets requests pass that bring a key; everything is closed unless listed.

    Args:
        app: What is guarded.
        keys: Any of them opens; with none, nothing is closed.
        pages: Addresses of files without data, readable by everybody, as a browser
            cannot send a key with an address.
        refused: Told the code of every refusal.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Iterable[SecretStr],
        pages: Iterable[str],
        refused: Callable[[str], None],
    ) -> None:
        self.app = app
        self.refused = refused
        self.digests = [_digest(key.get_secret_value().encode()) for key in keys]
        self.open = OPEN | set(pages)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check, then pass on."""
        if scope["type"] == "http" and self.digests and not self._may_pass(scope):
            refusal = ApiError(
                401,
                "invalid_api_key",
                "A key of this gateway is needed: Authorization: Bearer KEY.",
            )
            self.refused(refusal.code)
            await refusal.response()(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _may_pass(self, scope: Scope) -> bool:
        if scope["path"] in self.open:
            return True
        given = [v for name, v in scope["headers"] if name == b"authorization"]
        if len(given) != 1:
            return False
        scheme, _, key = given[0].partition(b" ")
        digest = _digest(key.strip())
        # Every key is compared, so the time says nothing about which one came close.
        same = [hmac.compare_digest(digest, known) for known in self.digests]
        return scheme.lower() == b"bearer" and any(same)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()

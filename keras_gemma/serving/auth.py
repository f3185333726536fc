"""API keys."""

import hashlib
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from keras_gemma.serving.errors import ApiError, error_response
from keras_gemma.serving.request_log import path_of, record_of

OPEN_PATHS = ("/health", "/live", "/ready")
"""Routes without a key, for probes of the process."""


class ApiKeys:
    """Middleware that refuses requests without one of the keys, before it reads their body.

    The static files of the chat page are open, because a browser cannot send a key for a page. The
    page asks for the key and sends it with each request.

    Args:
        app: The application behind it.
        keys: Accepted keys.
        open_paths: Paths that need no key.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], open_paths: Sequence[str]) -> None:
        self.app = app
        self.keys = [key.encode() for key in keys]
        self.open_paths = tuple(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._is_open(scope):
            key = key_of(Headers(scope=scope))
            if key is None or not self._is_known(key):
                message = (
                    "An API key is missing: send it as Authorization: Bearer KEY, or x-api-key."
                    if key is None
                    else "The API key is wrong."
                )
                response = error_response(scope, ApiError(401, message, "invalid_api_key"))
                await response(scope, receive, send)
                return
            record_of(scope).key_salt = salt_of(key)
        await self.app(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        path = path_of(scope)
        is_page = scope["method"] in ("GET", "HEAD") and (path == "/" or path.startswith("/page/"))
        return is_page or path in self.open_paths

    def _is_known(self, key: bytes) -> bool:
        # All keys are compared, so that the time does not tell which one is close.
        matches = [hmac.compare_digest(key, known) for known in self.keys]
        return any(matches)


def key_of(headers: Headers) -> bytes | None:
    """Returns the key of a request, from `Authorization: Bearer` or `x-api-key`."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip().encode("latin-1")
    if key := headers.get("x-api-key", "").strip():
        return key.encode("latin-1")
    return None


def salt_of(key: bytes) -> str:
    """Returns the salt of a key in the prefix cache, which does not reveal the key."""
    return hashlib.sha256(key).hexdigest()[:32]

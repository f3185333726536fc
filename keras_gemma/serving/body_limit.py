"""Limit of the size of request bodies."""

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from keras_gemma.serving.errors import ApiError, error_response


class BodyLimit:
    """Middleware that refuses large bodies: before it reads them if their length is declared.

    Starlette's own answers in plain text, in which clients find no message.

    Args:
        app: The application behind it.
        max_bytes: Maximum size of a body.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        message = f"The body has more than {self.max_bytes} bytes."
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and (len(length) > 18 or int(length) > self.max_bytes):
            error = ApiError(413, message, "body_too_large")
            response = error_response(scope, error, {"Connection": "close"})
            await response(scope, receive, send)
            return
        size = 0

        async def receive_limited() -> Message:
            nonlocal size
            received = await receive()
            size += len(received.get("body", b""))
            if size > self.max_bytes:
                raise HTTPException(413, message, {"Connection": "close"})
            return received

        await self.app(scope, receive_limited, send)

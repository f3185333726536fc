"""Server-sent events, and work that ends when the client leaves."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from keras_gemma.serving.errors import ApiError, body_of, is_anthropic, to_api_error
from keras_gemma.serving.request_log import path_of, record_of

T = TypeVar("T")

DONE = "data: [DONE]\n\n"
"""Last event of OpenAI's streams."""

PING = ": ping\n\n"
"""Comment, which clients ignore."""

PING_SECONDS = 15.0
"""Silence after which a comment is sent, because proxies close silent connections."""

HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Headers that keep proxies from collecting events."""


class ClientGoneError(Exception):
    """Error of a request whose client has closed the connection."""


def event(data: Any, name: str | None = None) -> str:
    """Returns one event. JSON is ASCII, because some clients split lines at Unicode separators."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data, separators=(',', ':'), allow_nan=False)}\n\n"


def error_event(path: str, error: ApiError) -> str:
    """Returns the event of an error after the status 200, in the format of the route."""
    _, body = body_of(path, error)
    return event(body, "error" if is_anthropic(path) or path == "/v1/responses" else None)


async def until_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Returns the result of `work`, which is canceled if the client leaves.

    Raises:
        ClientGoneError: If the client has left.
    """

    async def wait_until_gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(wait_until_gone())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            record_of(request.scope).is_client_gone = True
            raise ClientGoneError
        return task.result()
    finally:
        for future in (task, gone):
            future.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await future


async def with_pings(events: AsyncIterator[str]) -> AsyncIterator[str]:
    """Yields events, and a comment after each silence."""
    while True:
        following = asyncio.ensure_future(anext(events))  # type: ignore[arg-type]
        try:
            while not (await asyncio.wait({following}, timeout=PING_SECONDS))[0]:
                yield PING
            item = following.result()
        except StopAsyncIteration:
            return
        finally:
            following.cancel()
        yield item


class EventResponse(StreamingResponse):
    """Response of events. `close` is called at its end, however it ends."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], close: Callable[[], None]) -> None:
        super().__init__(events, headers=HEADERS)
        self.close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.close()


async def stream(
    request: Request, events: AsyncIterator[str], close: Callable[[], None]
) -> EventResponse:
    """Returns a response of `events`, after the first one is known.

    An error before it has a status code of its own. A later one becomes an event, because a client
    takes a stream that is cut for a success.

    Args:
        request: The request.
        events: Iterator of events.
        close: Function that ends the work, called when the response or the client ends.
    """
    path, record = path_of(request.scope), record_of(request.scope)
    try:
        first = await until_gone(request, anext(events))  # type: ignore[arg-type]
    except BaseException:
        close()
        raise

    async def all_events() -> AsyncIterator[str]:
        yield first
        try:
            async for item in with_pings(events):
                yield item
        except Exception as error:
            api_error = to_api_error(error)
            record.error = api_error.code or str(api_error.status)
            yield error_event(path, api_error)
        record.is_client_gone = False

    record.is_client_gone = True  # unless the last event is reached
    return EventResponse(all_events(), close)

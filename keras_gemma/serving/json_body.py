"""Bodies of requests: JSON, and nothing that Python's parser accepts in addition."""

import json
import math
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from keras_gemma.checks import is_deeper
from keras_gemma.text.tool_calls import MAX_LEVELS


class JsonRequest(Request):
    """Request whose body has no NaN, no infinity, and not too many levels.

    A response that repeats one of the numbers, such as in metadata, would not be JSON. Many levels
    exceed Python's recursion limit when they are written.
    """

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            body = await self.body()
            value = json.loads(body, parse_constant=refuse, parse_float=read_float)
            # Long prompts of ids have few brackets, and are not walked through.
            is_suspect = body.count(b"[") + body.count(b"{") > MAX_LEVELS
            if is_suspect and is_deeper(value, MAX_LEVELS):
                raise json.JSONDecodeError(f"more than {MAX_LEVELS} levels", "", 0)
            self._json = value
        return self._json


def refuse(constant: str) -> None:
    """Raises the error of a number that JSON does not have."""
    raise json.JSONDecodeError(f"{constant:.40} is not a number of JSON", constant, 0)


def read_float(text: str) -> float:
    """Returns a number, or raises a JSONDecodeError if it is too large."""
    value = float(text)
    if not math.isfinite(value):
        refuse(text)
    return value


class JsonRoute(APIRoute):
    """Route with a body of JSON."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(JsonRequest(request.scope, request.receive))

        return handle

"""Errors of requests: status codes, and bodies in the format of each API."""

import logging
import math
import re
from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from keras_gemma.generation.engine_request import (
    ContextLengthError,
    EngineStoppedError,
    QueueFullError,
)
from keras_gemma.serving.json_response import JsonResponse
from keras_gemma.serving.request_log import path_of, record_of

logger = logging.getLogger("keras_gemma.serving")

RETRY_SECONDS = 5
"""Value of Retry-After while the server starts or drains, in seconds."""

OPENAI_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
"""Error type by status in OpenAI's format. `invalid_request_error` below 500, else
`server_error`."""

ANTHROPIC_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
"""Error type by status in Anthropic's format. `invalid_request_error` below 500, else
`api_error`."""

TGI_ERRORS = {
    400: (422, "validation"),
    404: (404, "validation"),
    429: (429, "overloaded"),
    500: (424, "generation"),
    503: (503, "unhealthy"),
}
"""Status and error type by status in the format of Text Generation Inference."""

TGI_PATHS = ("/", "/generate", "/generate_stream", "/info")
"""Routes of Text Generation Inference."""

TYPE_TAGS = re.compile(r"str|int|float|bool|dict|tuple|constrained-.*|.*[\[\]()].*|[A-Z]\w*")
"""Parts of pydantic's locations that name a type of a union, not a field."""


class ApiError(Exception):
    """Error that a client receives.

    Args:
        status: HTTP status code.
        message: Message for the user.
        code: Machine-readable reason, such as `"model_not_found"`.
        param: Field of the request that is wrong.
        retry_after: Seconds after which the client may try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after = retry_after
        self.headers: dict[str, str] = {}
        if retry_after is not None:
            self.headers["Retry-After"] = str(max(1, math.ceil(retry_after)))
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"


def to_api_error(error: Exception) -> ApiError:
    """Returns the error of a request that `error` ends. Its cause is logged if it is ours."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextLengthError):
        return ApiError(400, str(error), "context_length_exceeded")
    if isinstance(error, QueueFullError):
        seconds = getattr(error, "retry_after", RETRY_SECONDS)
        return ApiError(429, str(error), "queue_full", retry_after=seconds)
    if isinstance(error, EngineStoppedError):
        return ApiError(503, str(error), "engine_stopped", retry_after=RETRY_SECONDS)
    if isinstance(error, RequestValidationError):
        return validation_error(error)
    if isinstance(error, HTTPException):
        api_error = ApiError(error.status_code, str(error.detail))
        api_error.headers |= dict(error.headers or {})
        return api_error
    logger.error("Request failed", exc_info=error)
    return ApiError(
        500, f"The server failed to answer this request ({type(error).__name__}).", "server_error"
    )


def invalid(error: Exception, param: str | None = None) -> ApiError:
    """Returns the error of a wrong value that was found by a check of this package.

    The field is the one that the message names, otherwise `param`.

    An error of another kind is not the client's and is returned by `to_api_error`.
    """
    if isinstance(error, ContextLengthError) or not isinstance(error, ValueError):
        return to_api_error(error)
    name = re.match(r"`(\w+)`", str(error))
    return ApiError(400, str(error), param=name[1] if name else param)


def validation_error(error: RequestValidationError) -> ApiError:
    """Returns the error of a body that does not fit its schema: the first problem."""
    problems = error.errors()
    # The most specific one. A union has one for each of its types.
    problem = max(problems, key=lambda problem: len(problem["loc"]))
    if problem["type"] == "json_invalid":
        reason = problem.get("ctx", {}).get("error", "")
        return ApiError(400, f"The body is not valid JSON: {reason}.", "invalid_json")
    param = field_of(problem)
    if not param and problem["type"] != "value_error":
        return ApiError(
            400,
            "The body must be a JSON object, with the header Content-Type: application/json.",
            "invalid_body",
        )
    if problem["type"] == "missing":
        return ApiError(400, f"`{param}` is missing.", "missing_field", param)
    if not param:
        return ApiError(400, f"{text_of(problem)}.", "invalid_value")
    same_depth = [other for other in problems if len(other["loc"]) == len(problem["loc"])]
    texts = [text_of(other) for other in same_depth if field_of(other) == param]
    text = " Or: ".join(dict.fromkeys(f"{text}." for text in texts))
    received = printable(problem.get("input"))
    return ApiError(400, f"`{param}`: {text} Received: {received}", "invalid_value", param)


def field_of(problem: Mapping[str, Any]) -> str:
    """Returns the field of a problem that pydantic found, such as `messages.0.role`."""
    place = problem["loc"][1:]
    fields = [part for part in place if isinstance(part, int) or not TYPE_TAGS.fullmatch(part)]
    return ".".join(map(str, fields))


def text_of(problem: Mapping[str, Any]) -> str:
    """Returns the message of a problem that pydantic found."""
    return problem["msg"].removeprefix("Value error, ").rstrip(".")


def printable(value: Any) -> str:
    """Returns the beginning of a value as ASCII, for error messages."""
    return f"{value!a:.100}"


def is_anthropic(path: str) -> bool:
    """Returns True if a route is Anthropic's."""
    return path.startswith("/v1/messages")


def body_of(path: str, error: ApiError) -> tuple[int, dict[str, Any]]:
    """Returns status and body of an error in the format of the route."""
    status, message = error.status, error.message
    server = status >= 500
    if is_anthropic(path):
        kind = ANTHROPIC_TYPES.get(status, "api_error" if server else "invalid_request_error")
        return status, {"type": "error", "error": {"type": kind, "message": message}}
    if path in TGI_PATHS:
        status, kind = TGI_ERRORS.get(status, (status, "incomplete" if server else "validation"))
        return status, {"error": message, "error_type": kind}
    kind = OPENAI_TYPES.get(status, "server_error" if server else "invalid_request_error")
    details = {"message": message, "type": kind, "param": error.param, "code": error.code}
    return status, {"error": details}


def error_response(
    scope: Mapping[str, Any], error: ApiError, headers: Mapping[str, str] | None = None
) -> Response:
    """Returns the response to a request that failed."""
    status, body = body_of(path_of(scope), error)
    record_of(scope).error = error.code or str(status)
    return JsonResponse(body, status, {**error.headers, **(headers or {})})


async def handle(request: Request, error: Exception) -> Response:
    """Exception handler of the application."""
    api_error = to_api_error(error)
    if isinstance(error, HTTPException) and error.status_code == 404:
        api_error.message = f"No route {request.method} {path_of(request.scope)!a:.200}."
        api_error.code = "not_found"
    if isinstance(error, HTTPException) and error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        api_error.message = f"{request.method} is not allowed here. Use {allowed}."
        api_error.code = "method_not_allowed"
    return error_response(request.scope, api_error)


class UnexpectedErrors:
    """Middleware that answers 500 after an exception without a handler.

    Starlette's own is behind the log, and would leave out the request ID.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_started = False

        async def send_and_note(message: Message) -> None:
            nonlocal is_started
            is_started = True
            await send(message)

        try:
            await self.app(scope, receive, send_and_note)
        except Exception as error:
            if is_started or scope["type"] != "http":
                raise
            await error_response(scope, to_api_error(error))(scope, receive, send)

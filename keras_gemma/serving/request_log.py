"""One line of JSON per request, its ID and its trace."""

import dataclasses
import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("keras_gemma.serving.requests")

REQUEST_ID = re.compile(r"[\w.:/+=@-]{1,128}", re.ASCII)
"""Pattern of the request IDs that are taken from clients."""

TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}")
"""Pattern of W3C's header `traceparent`: trace ID and span ID."""

QUIET_PATHS = ("/health", "/live", "/ready", "/metrics")
"""Routes that are polled, and therefore not logged."""


@dataclasses.dataclass
class RequestRecord:
    """Facts about one HTTP request, for its log line and the metrics."""

    request_id: str = ""
    trace_id: str | None = None
    method: str = ""
    route: str = ""
    """Path of the route, with parameters by name. Unknown routes are `""`."""
    status: int = 0
    model: str | None = None
    is_stream: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    queue_seconds: float | None = None
    prefill_seconds: float | None = None
    decode_seconds: float | None = None
    finish_reasons: list[str] = dataclasses.field(default_factory=list)
    is_client_gone: bool = False
    error: str | None = None
    """Code of the error that the client received."""
    prompt: Any = None
    """Prompt as sent, if prompts are logged."""
    key_salt: str = ""
    """Salt of the prefix cache. It is not logged."""
    start: float = dataclasses.field(default_factory=time.monotonic)

    def line(self) -> str:
        """Returns the log line."""
        fields = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds": round(time.monotonic() - self.start, 4),
        }
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("start", "key_salt") or value is None:
                continue
            fields[field.name] = round(value, 4) if isinstance(value, float) else value
        return json.dumps(fields, default=str)


def record_of(scope: Mapping[str, Any]) -> RequestRecord:
    """Returns the record of a request."""
    record = scope.get("state", {}).get("record")
    return record if record is not None else RequestRecord()


def path_of(scope: Mapping[str, Any]) -> str:
    """Returns the path of a request, without the prefix of a proxy."""
    path, root = scope["path"], scope.get("root_path", "")
    return path.removeprefix(root) if root else path


class RequestLog:
    """Middleware that writes the log line of each request, and sets the header `X-Request-Id`.

    Args:
        app: The application behind it.
        observe: Function that is called with each record at the end of its request.
    """

    def __init__(self, app: ASGIApp, observe: Callable[[RequestRecord], None]) -> None:
        self.app = app
        self.observe = observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")
        if not REQUEST_ID.fullmatch(request_id):
            request_id = uuid.uuid4().hex
        trace = TRACEPARENT.fullmatch(headers.get("traceparent", ""))
        record = RequestRecord(request_id, (trace and trace[1]) or None, scope["method"])
        scope.setdefault("state", {})["record"] = record

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                response_headers = MutableHeaders(scope=message)
                response_headers["X-Request-Id"] = request_id
                response_headers["Request-Id"] = request_id  # Anthropic's name
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            record.route = getattr(scope.get("route"), "path", "")
            if record.route not in QUIET_PATHS:
                logger.info(record.line())
            self.observe(record)

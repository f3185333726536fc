"""State that the routes of one application share."""

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import anyio.to_thread
from starlette.requests import Request

from keras_gemma.causal_lm.text_engine import TextEngine
from keras_gemma.generation.engine_request import TokenConstraint
from keras_gemma.serving.errors import RETRY_SECONDS, ApiError
from keras_gemma.serving.metrics import ServerMetrics
from keras_gemma.serving.settings import ServerSettings

T = TypeVar("T")

MAX_COMPILING = 2
"""Maximum number of response formats that are compiled at a time."""

Status = Literal["ready", "starting", "draining", "dead"]

PLACEHOLDER_NAMES = ("", "dummy", "tgi")
"""Model names that huggingface_hub's client and TGI's documentation use for any model."""

STATUS_MESSAGES: dict[Status, str] = {
    "starting": "The server is starting. Try again in a moment.",
    "draining": "The server is shutting down. Send the request to another one.",
    "dead": "The engine has failed. Restart the server.",
}


@dataclasses.dataclass
class Service:
    """Engine, settings and metrics of one application."""

    texts: TextEngine
    settings: ServerSettings
    metrics: ServerMetrics
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    is_warm: threading.Event = dataclasses.field(default_factory=threading.Event)
    """Set when requests are accepted."""
    is_draining: threading.Event = dataclasses.field(default_factory=threading.Event)
    compile_limiter: anyio.CapacityLimiter = dataclasses.field(
        default_factory=lambda: anyio.CapacityLimiter(MAX_COMPILING)
    )

    @property
    def model(self) -> str:
        """First served name."""
        return self.settings.served_names[0]

    def status(self) -> Status:
        """Returns the state of the server."""
        if self.is_draining.is_set():
            return "draining"
        if not self.is_warm.is_set():
            return "starting"
        engine = self.texts.engine
        return "ready" if engine.is_healthy and engine.is_accepting else "dead"

    def check_ready(self) -> None:
        """Raises an ApiError unless requests are accepted."""
        status = self.status()
        if status != "ready":
            raise ApiError(503, STATUS_MESSAGES[status], status, retry_after=RETRY_SECONDS)

    def check_model(self, name: str | None) -> str:
        """Returns the name of the model in responses, or raises an ApiError."""
        names = self.settings.served_names
        if name is None or name in PLACEHOLDER_NAMES:
            return self.model
        if name not in names:
            raise ApiError(
                404,
                f"The model {name!a:.100} does not exist here. Served: {', '.join(names)}.",
                "model_not_found",
                "model",
            )
        return name

    async def constraint(
        self, response_format: dict[str, Any]
    ) -> Callable[[], TokenConstraint] | None:
        """Same as `TextEngine.constraint`, on one of a few threads.

        Compiling takes long for some formats, and would keep the threads of other requests busy.
        """
        return await anyio.to_thread.run_sync(
            self.texts.constraint, response_format, limiter=self.compile_limiter
        )

    def drain(self) -> None:
        """Refuses new requests, and waits for the running ones. Blocks."""
        self.is_draining.set()
        self.texts.engine.drain(self.settings.drain_seconds)


def service_of(request: Request) -> Service:
    """Returns the service of the application."""
    return request.app.state.service


async def in_thread(function: Callable[..., T], *arguments: Any) -> T:
    """Returns the result of work that would keep other requests from the event loop."""
    return await anyio.to_thread.run_sync(function, *arguments)

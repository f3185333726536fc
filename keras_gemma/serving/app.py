"""The application: middleware, routes and its life."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from keras_gemma.causal_lm.text_engine import TextEngine
from keras_gemma.generation.engine_request import EngineRequest, QueueFullError
from keras_gemma.serving.auth import OPEN_PATHS, ApiKeys
from keras_gemma.serving.body_limit import BodyLimit
from keras_gemma.serving.errors import ApiError, UnexpectedErrors, handle
from keras_gemma.serving.metrics import ServerMetrics
from keras_gemma.serving.request_log import RequestLog
from keras_gemma.serving.routes import (
    chat,
    completions,
    messages,
    models,
    page,
    responses,
    status,
    tgi,
    tokens,
)
from keras_gemma.serving.service import Service, in_thread
from keras_gemma.serving.settings import ServerSettings
from keras_gemma.serving.sse import ClientGoneError
from keras_gemma.version import __version__

ROUTERS = (chat, completions, responses, models, messages, tgi, tokens, status, page)
"""Modules of routes, in the order of the documentation."""

WARM_UP_SETTINGS: tuple[dict[str, float], ...] = (
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 1.0, "top_p": 0.9},
)
"""Settings whose programs are compiled before the server is ready: greedy, random, filtered."""

WARM_UP_REQUESTS = 32
"""Maximum number of requests at a time before the server is ready."""

logger = logging.getLogger("keras_gemma.serving")


def create_app(texts: TextEngine, settings: ServerSettings | None = None) -> FastAPI:
    """Returns the application that serves one engine.

    The engine is started with the application and stopped with it.

    Args:
        texts: Engine and tokenizer.
        settings: Settings of the server.
    """
    settings = settings or ServerSettings()
    metrics = ServerMetrics(texts.engine, settings.served_names[0])
    service = Service(texts, settings, metrics)
    app = FastAPI(
        title="keras-gemma",
        version=__version__,
        description="Gemma models with the APIs of OpenAI, Anthropic and TGI.",
        lifespan=lambda app: life(service),
        telemetry={"logs": False},  # They would contain the prompts of wrong requests.
    )
    app.state.service = service
    for module in ROUTERS:
        app.include_router(module.router)
    handlers: dict[Any, Any] = {
        ApiError: handle,
        HTTPException: handle,
        RequestValidationError: handle,
        ClientGoneError: gone,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
    # The last one is the first to see a request.
    app.add_middleware(UnexpectedErrors)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    if settings.api_keys:
        open_paths = [*OPEN_PATHS, *(["/metrics"] if settings.metrics_without_key else [])]
        app.add_middleware(ApiKeys, keys=settings.api_keys, open_paths=open_paths)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    app.add_middleware(RequestLog, observe=metrics.observe)
    return app


@contextlib.asynccontextmanager
async def life(service: Service) -> AsyncIterator[None]:
    """Runs the engine while the application runs."""
    engine = service.texts.engine
    engine.start()
    task = None
    if service.settings.warm_up:
        task = asyncio.create_task(in_thread(warm_up, service))
    else:
        service.is_warm.set()
    yield
    if task is not None:
        await task
    await in_thread(engine.stop)


def warm_up(service: Service) -> None:
    """Compiles the programs of short requests, and then accepts requests.

    As many requests as the engine has slots pass through all of its batch sizes.
    """
    texts, engine = service.texts, service.texts.engine
    start = np.array([texts.tokenizer.start_token_id], "int32")
    texts.tokenizer.tokenize("Hello", parse_special=False)  # prepares the vocabulary of chats
    count = min(engine.max_batch_size, WARM_UP_REQUESTS)
    try:
        for settings in WARM_UP_SETTINGS:
            request = EngineRequest(start, count + 2, seed=0, **settings)
            handles = []
            with contextlib.suppress(QueueFullError):  # A short queue is legal.
                for _ in range(count):
                    handles.append(engine.add_request(request))
            for handle in handles:
                handle.result()
    except Exception:
        logger.exception("The first requests have failed")
    service.is_warm.set()


async def gone(request: Request, error: Exception) -> Response:
    """Returns the response to a client that has left, which only the log sees."""
    return Response(status_code=499)

"""HTTP server with the APIs of OpenAI, Anthropic and Text Generation Inference.

Needs the extra `serve`. The engine is in `generation/`, and its texts are in
`causal_lm/text_engine.py`. Knows nothing about models and frameworks.

    app.py               the application
    service.py           state that the routes share
    settings.py          settings of the server
    server.py            uvicorn, with a drain at its end
    routes/              routes, one file per API
    schemas/             bodies of requests, one file per API
    generation.py        sequences of one HTTP request
    chat_prompt.py       conversations as clients send them
    chat_generation.py   replies: text and tool calls
    token_names.py       strings of tokens, and log-probabilities
    sse.py               server-sent events, and clients that leave
    errors.py            status codes and bodies of errors
    auth.py              API keys
    body_limit.py        limit of body sizes
    request_log.py       log lines and request IDs
    metrics.py           Prometheus metrics
    page/                the chat page
"""

import importlib
from typing import Any

from keras_gemma.extras import check_serve

_FILES = {"ServerSettings": "settings", "create_app": "app", "serve": "server"}
"""File of each public name."""

__all__ = ["ServerSettings", "create_app", "serve"]


def __getattr__(name: str) -> Any:
    """Returns a public name, from the file that defines it."""
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    check_serve()
    return getattr(importlib.import_module(f"{__name__}.{_FILES[name]}"), name)

"""The server process: uvicorn, and an end that loses no request."""

import logging
import os
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from keras_gemma.causal_lm.text_engine import TextEngine
from keras_gemma.serving.app import create_app
from keras_gemma.serving.service import Service
from keras_gemma.serving.settings import ServerSettings

CLOSE_SECONDS = 5
"""Time in which the last bytes must reach their clients, in seconds."""

KEEP_ALIVE_SECONDS = 75
"""Time that an idle connection stays open: longer than the clients keep theirs."""

ENGINE_FAILED = 1
"""Exit code if the engine has failed, so that a supervisor restarts the process."""


def bind(host: str, port: int) -> socket.socket:
    """Returns a socket, before a model is loaded for minutes in vain.

    Raises:
        OSError: If the address is in use, or not one of this machine.
    """
    sock = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        if sock is not None:
            sock.close()
        raise OSError(
            f"The server cannot listen on {host}, port {port}: {error.strerror or error}. Pass "
            f"another host or port. Received: host={host!r}, port={port}"
        ) from error
    return sock


class Server(uvicorn.Server):
    """Server that drains on a signal, and ends at once on a second one.

    While it drains, it answers: new requests get 503, and probes see that it is not ready.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service
        self.exit_code = 0
        self.exit_now: Callable[[int], None] | None = None
        """Function that a second signal calls with an exit code. `None` leaves the loop only."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.service.is_draining.is_set():
            if self.exit_now is not None:
                self.exit_now(128 + sig)
            self.should_exit = self.force_exit = True
            return
        self.service.is_draining.set()
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        self.service.drain()
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        # An engine without progress may recover; one that accepts nothing does not.
        is_running = self.service.is_warm.is_set() and not self.service.is_draining.is_set()
        if is_running and not self.service.texts.engine.is_accepting:
            self.exit_code = ENGINE_FAILED
            self.should_exit = True
        return await super().on_tick(counter)


def make_server(texts: TextEngine, settings: ServerSettings, **options: Any) -> Server:
    """Returns a server. `options` are those of `uvicorn.Config`, such as `ssl_certfile`."""
    app = create_app(texts, settings)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=CLOSE_SECONDS,
        lifespan="on",
        ws="none",
        **options,
    )
    return Server(config, app.state.service)


def serve(texts: TextEngine, settings: ServerSettings, sock: socket.socket, **options: Any) -> int:
    """Serves until a signal comes or the engine fails, and returns the exit code.

    Args:
        texts: Engine and tokenizer.
        settings: Settings of the server.
        sock: Result of `bind`.
        **options: Options of uvicorn.
    """
    log_to_stderr()
    server = make_server(texts, settings, **options)
    server.exit_now = os._exit  # A device that hangs keeps the engine's thread forever.
    server.run(sockets=[sock])
    texts.engine.stop()
    return server.exit_code


def log_to_stderr() -> None:
    """Writes log lines of requests as they are, and other messages with their level."""
    requests = logging.getLogger("keras_gemma.serving.requests")
    others = logging.getLogger("keras_gemma")
    for logger, form, level in (
        (requests, "%(message)s", logging.INFO),
        (others, "%(levelname)s %(name)s: %(message)s", logging.WARNING),
    ):
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(form))
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)

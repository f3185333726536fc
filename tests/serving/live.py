"""A real server on a free port, in a thread."""

import contextlib
import threading
import time

from keras_gemma.causal_lm.text_engine import TextEngine
from keras_gemma.serving.server import bind, make_server
from keras_gemma.serving.settings import ServerSettings


class LiveServer:
    """A running server. `url` has no slash at its end."""

    def __init__(self, texts, settings, **options):
        sock = bind("127.0.0.1", 0)
        self.port = sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = make_server(texts, settings, **options)
        self.thread = threading.Thread(target=self.server.run, args=([sock],))
        self.thread.start()
        while not self.server.started:
            time.sleep(0.002)

    def signal(self):
        self.server.handle_exit(15, None)

    def join(self, seconds=10):
        self.thread.join(seconds)
        assert not self.thread.is_alive()


@contextlib.contextmanager
def live(texts, settings, **options):
    """Runs a server, and ends it and its engine."""
    server = LiveServer(texts, settings, **options)
    try:
        yield server
    finally:
        server.server.should_exit = True
        server.join()


@contextlib.contextmanager
def live_server(engine, preprocessor, score_prompt=None, options=None, **settings):
    """Runs a server on a fake engine."""
    settings = ServerSettings(**{"served_names": ("tiny",), **settings})
    texts = TextEngine(engine, preprocessor, score_prompt)
    with live(texts, settings, **(options or {})) as server:
        try:
            yield server
        finally:
            engine.release()
    if not engine.is_stopped:
        engine.stop()

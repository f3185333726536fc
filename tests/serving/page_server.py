"""Replacement of the server in tests: the chat page, and answers that the last message chooses."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PAGE = Path(__file__).parents[2] / "keras_gemma/serving/page"
CONTENT_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
POLICY = "default-src 'self'; base-uri 'none'; form-action 'none'; object-src 'none'"
API_KEY = "correct"
MODEL = "gemma_tiny"


class Handler(BaseHTTPRequestHandler):
    """Routes of the page and of OpenAI's API. The answer to a text repeats it, word by word.

    "wait" is never answered to the end, "busy" is refused, "break" fails in the middle, "close"
    ends without an end.
    """

    protocol_version = "HTTP/1.1"
    server: "StandIn"

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            if self.is_allowed():
                models = [{"id": MODEL, "object": "model"}]
                self.answer(200, "application/json", json.dumps({"data": models}).encode())
            return
        path = PAGE / ("index.html" if self.path == "/" else self.path.removeprefix("/page/"))
        if path.parent != PAGE or not path.is_file():
            self.fail(404, "The page does not exist.")
            return
        content_type = CONTENT_TYPES.get(path.suffix, "image/svg+xml")
        headers = {"Content-Security-Policy": POLICY}
        self.answer(200, content_type, path.read_bytes(), headers)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.is_allowed():
            return
        self.server.bodies.append(body)
        text = body["messages"][-1]["content"]
        if text == "busy":
            self.fail(429, "The queue is full.", {"Retry-After": "7"})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            self.stream(text)
        except OSError:
            self.server.num_gone_clients += 1
        self.close_connection = True

    def stream(self, text: str) -> None:
        self.event(self.chunk({"role": "assistant", "content": ""}))
        answer = self.server.answers.get(text, f"{len(self.server.bodies)}: {text}")
        words = answer.split(" ")
        for i, word in enumerate(words):
            self.event(self.chunk({"content": word if i == 0 else f" {word}"}))
            time.sleep(self.server.seconds_per_word)
        while text == "wait":
            time.sleep(0.02)
            self.event(self.chunk({"content": " ."}))
        if text == "break":
            self.event({"error": {"message": "The model failed.", "type": "server_error"}})
        if text in ("break", "close"):
            return
        self.event(self.chunk({}, "stop"))
        usage = {"prompt_tokens": 3, "completion_tokens": len(words), "total_tokens": 3}
        self.event({"id": "chatcmpl-1", "choices": [], "usage": usage})
        self.wfile.write(b": ping\n\ndata: [DONE]\n\n")

    def chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> dict:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return {"id": "chatcmpl-1", "choices": [choice], "usage": None}

    def event(self, data: dict) -> None:
        self.wfile.write(b"data: " + json.dumps(data).encode() + b"\n\n")

    def is_allowed(self) -> bool:
        allowed = not self.server.has_key or self.headers["Authorization"] == f"Bearer {API_KEY}"
        if not allowed:
            self.fail(401, "The API key is missing or wrong.")
        return allowed

    def fail(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        self.answer(status, "application/json", json.dumps({"error": error}).encode(), headers)

    def answer(
        self, status: int, content_type: str, body: bytes, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Prints nothing."""


class StandIn(ThreadingHTTPServer):
    """Server on a free port, with the bodies of all requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[dict] = []
        self.answers: dict[str, str] = {}
        self.num_gone_clients = 0
        self.has_key = False
        self.seconds_per_word = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"


@contextmanager
def stand_in() -> Iterator[StandIn]:
    """Runs the server in a thread."""
    with StandIn() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()

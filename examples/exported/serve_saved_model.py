"""Serves an exported SavedModel over HTTP, with only tensorflow and tensorflow_text.

    lm.export("my_export", max_new_tokens=256)
    python examples/exported/serve_saved_model.py my_export --port 8000

    curl localhost:8000/generate -d '{"prompts": ["ROMEO:"], "max_new_tokens": 40}'
    curl localhost:8000/chat -d '{"messages": [{"role": "user", "content": "Hello"}]}'
    curl localhost:8000/health

Both accept the settings in `SETTINGS` too. Responses are JSON; an invalid request gets status 400
and {"error": "..."}. call_saved_model.py is a client in Python.
"""

import argparse
import http.server
import json
import re
import threading
from typing import Any

import tensorflow as tf
import tensorflow_text  # noqa: F401  # the operations that the model reads text with

SETTINGS = {
    "max_new_tokens": ("an integer", int, tf.int32),
    "temperature": ("a number", (int, float), tf.float32),
    "top_k": ("an integer", int, tf.int32),
    "top_p": ("a number", (int, float), tf.float32),
    "min_p": ("a number", (int, float), tf.float32),
    "seed": ("an integer", int, tf.int32),
    "stop": ("a list of strings", list, tf.string),
}
"""Type of each setting of a request: for messages, in Python and in TensorFlow."""

MAX_REQUEST_BYTES = 1 << 20
"""Maximum size of a request, in bytes."""


class BadRequestError(Exception):
    """Invalid request. The message is sent to the client."""


def are_strings(value: Any) -> bool:
    """Returns True if `value` is a list of at least one string."""
    return isinstance(value, list) and value != [] and all(isinstance(x, str) for x in value)


def read_settings(request: dict[str, Any], needed: str) -> dict[str, tf.Tensor]:
    """Returns the settings in `request`, without the argument `needed`."""
    unknown = sorted(request.keys() - SETTINGS.keys() - {needed})
    if unknown:
        known = ", ".join([needed, *SETTINGS])
        raise BadRequestError(f"Unknown: {', '.join(unknown)}. A request may have {known}.")
    settings = {}
    for name in SETTINGS.keys() & request.keys():
        value, (words, kind, dtype) = request[name], SETTINGS[name]
        fits = are_strings(value) if kind is list else isinstance(value, kind)
        if not fits or isinstance(value, bool):
            raise BadRequestError(f"`{name}` must be {words}. Received: {json.dumps(value)}")
        if kind is int and not -(2**31) <= value < 2**31:
            raise BadRequestError(f"`{name}` must fit into 32 bits. Received: {value}")
        settings[name] = tf.constant(value, dtype)
    return settings


def strings(tensor: tf.Tensor) -> list[str]:
    """Converts a string tensor `[B]` to Python strings."""
    return [text.decode("utf-8", "replace") for text in tensor.numpy().tolist()]


def generate(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Answers `{"prompts": [...]}`."""
    prompts = request.get("prompts")
    if not are_strings(prompts):
        raise BadRequestError(
            f"`prompts` must be a list of strings. Received: {json.dumps(prompts)}"
        )
    result = model.generate(tf.constant(prompts), **read_settings(request, "prompts"))
    rows = zip(
        strings(result["text"]),
        result["lengths"].numpy().tolist(),
        strings(result["finish_reason"]),
        strict=True,
    )
    return {
        "completions": [
            {"text": text, "tokens": tokens, "finish_reason": reason}
            for text, tokens, reason in rows
        ]
    }


def chat(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Answers `{"messages": [{"role": ..., "content": ...}, ...]}`."""
    if not hasattr(model, "chat"):
        raise BadRequestError("This model knows no turns of a chat: use /generate.")
    messages = request.get("messages")
    turns = [
        [message.get(key) if isinstance(message, dict) else None for message in messages]
        if isinstance(messages, list)
        else None
        for key in ("role", "content")
    ]
    if not all(map(are_strings, turns)):
        raise BadRequestError(
            "`messages` must be a list of objects with the strings `role` and `content`. "
            f"Received: {json.dumps(messages)}"
        )
    roles, contents = (tf.constant([turn]) for turn in turns)
    result = model.chat(roles, contents, **read_settings(request, "messages"))
    (reply,), (reason,) = strings(result["reply"]), strings(result["finish_reason"])
    return {"reply": reply, "finish_reason": reason}


def sentence_of(error: tf.errors.InvalidArgumentError) -> str:
    """Returns the message of a check in the model, without the text that TensorFlow adds."""
    found = re.search(r"assertion failed: \[(.*)\]", error.message)
    return found[1].replace("] [", " ") if found else error.message


ANSWERS = {"/generate": generate, "/chat": chat}


class Handler(http.server.BaseHTTPRequestHandler):
    """Handler of one request. The model of the server answers one request at a time."""

    def do_GET(self) -> None:
        if self.path == "/health":
            self.answer(200, {"status": "ok"})
        else:
            self.answer(404, {"error": f"GET /health, or POST {' or '.join(ANSWERS)}."})

    def do_POST(self) -> None:
        if self.path not in ANSWERS:
            self.answer(404, {"error": f"POST {' or '.join(ANSWERS)}, or GET /health."})
            return
        try:
            request = self.read()
            with self.server.turn:
                content = ANSWERS[self.path](self.server.model, request)
        except BadRequestError as error:
            self.answer(400, {"error": str(error)})
        except tf.errors.InvalidArgumentError as error:
            self.answer(400, {"error": sentence_of(error)})
        else:
            self.answer(200, content)

    def read(self) -> dict[str, Any]:
        """Returns the JSON object in the body."""
        size = self.headers.get("Content-Length", "")
        if not size.isdecimal() or int(size) > MAX_REQUEST_BYTES:
            self.close_connection = True
            raise BadRequestError(f"Content-Length must be given, and {MAX_REQUEST_BYTES} at most.")
        try:
            request = json.loads(self.rfile.read(int(size)))
        except ValueError as error:
            raise BadRequestError(f"The body must be JSON: {error}.") from error
        if not isinstance(request, dict):
            raise BadRequestError("The body must be a JSON object.")
        return request

    def answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    options = parser.parse_args()
    server = http.server.ThreadingHTTPServer((options.host, options.port), Handler)
    server.model = tf.saved_model.load(options.folder)
    server.turn = threading.Lock()
    print(f"Serving on http://{options.host}:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()

"""Clients that leave, shutdown, and an engine that fails: on a real server."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2
import pytest

from keras_gemma.generation.engine_request import EngineStoppedError
from keras_gemma.serving.server import ENGINE_FAILED, bind

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hi"}]}
LONG = "a b c d e f g h i j k l m n o p q r s t u v w x y z " * 4


def send(live, path, body):
    """Returns a connection that has sent a request."""
    data = json.dumps(body).encode()
    sock = socket.create_connection(("127.0.0.1", live.port))
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    sock.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return sock


APIS = [
    (CHAT, HELLO),
    (CHAT, HELLO | {"stream": True}),
    ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 200}),
    ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 200, "stream": True}),
    ("/v1/responses", {"input": "a", "stream": True}),
    ("/v1/messages", HELLO | {"max_tokens": 200, "stream": True}),
    ("/generate", {"inputs": "a", "parameters": {"max_new_tokens": 200}}),
    ("/generate_stream", {"inputs": "a", "parameters": {"max_new_tokens": 200}}),
]


@pytest.mark.parametrize(("path", "body"), APIS)
def test_a_client_that_leaves_frees_its_slot(live, engine, path, body):
    engine.text, engine.delay = LONG, 0.005
    with contextlib.closing(send(live, path, body)) as sock:
        engine.wait_until(lambda engine: engine.stats().slots_used)
        if "stream" in str(body) or "stream" in path:
            assert b"200 OK" in sock.recv(100)
    engine.wait_until(lambda engine: not engine.stats().slots_used)
    assert engine.num_cancelled >= 1
    engine.text, engine.delay = "ok", 0.0
    assert httpx2.post(live.url + CHAT, json=HELLO).status_code == 200


@pytest.mark.parametrize(("path", "body"), APIS)
def test_a_client_that_leaves_the_queue(live, engine, path, body):
    engine.hold()
    with contextlib.closing(send(live, path, body)):
        engine.wait_until(lambda engine: engine.waiting)
    engine.wait_until(lambda engine: not engine.waiting)
    engine.release()
    assert httpx2.post(live.url + CHAT, json=HELLO).status_code == 200
    text = httpx2.get(live.url + "/metrics").text
    assert 'keras_gemma_client_disconnects_total{model_name="tiny"} 1.0' in text


def test_streams_arrive_while_they_grow(live, engine):
    engine.text = "one two three"
    engine.hold()
    with contextlib.closing(send(live, CHAT, HELLO | {"stream": True})) as sock:
        engine.wait_until(lambda engine: engine.waiting)
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            sock.recv(1)  # No status before the first token.
        with engine.turn:
            engine.step()
        sock.settimeout(5)
        received = b""
        while b'"content":"o' not in received:
            received += sock.recv(10_000)
        assert b"[DONE]" not in received


def test_the_connection_is_kept_and_streams_close_at_once(live):
    with httpx2.Client() as client:
        for _ in range(3):
            response = client.post(live.url + CHAT, json=HELLO | {"stream": True})
            assert response.text.endswith("data: [DONE]\n\n")


def status(live, path="/ready"):
    return httpx2.get(live.url + path).status_code


def test_a_signal_lets_running_requests_end(live, engine):
    engine.text, engine.delay = LONG, 0.002
    answers = []

    def ask():
        answers.append(httpx2.post(live.url + CHAT, json=HELLO | {"stream": True}).text)

    thread = threading.Thread(target=ask)
    thread.start()
    engine.wait_until(lambda engine: engine.running)
    engine.hold()
    live.signal()
    engine.wait_until(lambda engine: not engine.is_accepting)
    refused = httpx2.post(live.url + CHAT, json=HELLO)
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
    assert "retry-after" in refused.headers
    assert (status(live), status(live, "/health"), status(live, "/live")) == (503, 503, 200)
    engine.release()
    thread.join()
    assert '"finish_reason":"stop"' in answers[0] and answers[0].endswith("[DONE]\n\n")
    live.join()
    assert live.server.exit_code == 0
    with pytest.raises(httpx2.ConnectError):
        status(live)


def test_the_drain_ends_streams_with_an_error(live, engine):
    engine.text, engine.delay = LONG, 0.02
    live.server.service.settings.__dict__["drain_seconds"] = 0.1
    with httpx2.stream("POST", live.url + CHAT, json=HELLO | {"stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        live.signal()
        *_, last = [line for line in lines if line]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_stopped"
    live.join()


def test_a_second_signal_ends_at_once(live, engine):
    engine.hold()
    with contextlib.closing(send(live, CHAT, HELLO)):
        engine.wait_until(lambda engine: engine.waiting)
        live.signal()
        engine.wait_until(lambda engine: not engine.is_accepting)
        live.signal()
        live.join()
        assert not engine.is_stopped  # The server has not waited for the drain.


HANGING = """
import sys, threading
from keras_gemma import GemmaCausalLMPreprocessor
from keras_gemma.causal_lm.text_engine import TextEngine
from keras_gemma.serving.server import bind, serve
from keras_gemma.serving.settings import ServerSettings
from tests.serving.fake_engine import FakeEngine

preprocessor = GemmaCausalLMPreprocessor.from_preset("gemma_tiny_instruct_en")
engine = FakeEngine(preprocessor.tokenizer)
engine.drain = lambda timeout: (print("draining", flush=True), threading.Event().wait())
engine.stop = engine.drain
sock = bind("127.0.0.1", 0)
engine.run = lambda: print("running", flush=True)
sys.exit(serve(TextEngine(engine, preprocessor), ServerSettings(), sock))
"""


def test_a_second_signal_ends_a_process_whose_engine_hangs():
    command = [sys.executable, "-c", HANGING]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "running\n"
            process.send_signal(signal.SIGTERM)
            assert process.stdout.readline() == "draining\n"
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 128 + signal.SIGTERM
        finally:
            process.kill()


def test_idle_connections_do_not_delay_the_end(live, caplog):
    with contextlib.closing(socket.create_connection(("127.0.0.1", live.port))):
        live.signal()
        live.join()
    assert "timeout graceful shutdown exceeded" not in caplog.text


def test_silent_streams_have_comments(client, engine, monkeypatch):
    monkeypatch.setattr("keras_gemma.serving.sse.PING_SECONDS", 0.005)
    engine.delay = 0.03
    for path, body in APIS:
        if body.get("stream") or path == "/generate_stream":
            response = client.post(path, json=body)
            assert response.text[0] != ":" and "\n\n: ping\n\n" in response.text, path
    assert engine.num_cancelled == 0


def test_a_dead_engine_ends_the_process(live, engine):
    engine.hold()
    with contextlib.closing(send(live, CHAT, HELLO | {"stream": True})) as sock:
        engine.wait_until(lambda engine: engine.waiting)
        with engine.turn:
            engine.is_accepting = engine.is_healthy = False
            engine.end_all(EngineStoppedError("The model failed three times in a row."))
        assert b"503" in sock.recv(100)
    live.join()
    assert live.server.exit_code == ENGINE_FAILED


def test_an_unhealthy_engine(live, engine):
    """The engine makes no progress, which may pass."""
    engine.is_healthy = False
    health = httpx2.get(live.url + "/health")
    assert health.status_code == 503 and health.json()["status"] == "dead"
    assert status(live) == status(live, "/live") == 503
    refused = httpx2.post(live.url + CHAT, json=HELLO)
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "dead"
    engine.is_healthy = True
    assert status(live) == 200
    assert httpx2.post(live.url + CHAT, json=HELLO).status_code == 200


def test_requests_before_the_server_is_warm(client_of, engine):
    engine.hold()
    client = client_of(warm_up=True)
    response = client.post(CHAT, json=HELLO)
    assert response.status_code == 503 and response.json()["error"]["code"] == "starting"
    assert client.get("/health").json()["status"] == "starting"
    assert client.get("/live").status_code == 200
    engine.release()
    while client.get("/ready").status_code != 200:
        time.sleep(0.002)
    assert client.post(CHAT, json=HELLO).status_code == 200


def test_a_port_in_use(live):
    with pytest.raises(OSError, match=rf"cannot listen on 127.0.0.1, port {live.port}: .*in use"):
        bind("127.0.0.1", live.port)
    with pytest.raises(OSError, match=r"cannot listen on no.such.host.invalid"):
        bind("no.such.host.invalid", 80)

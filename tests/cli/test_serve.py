"""`keras-gemma serve`."""

import contextlib
import json
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request

import pytest

from keras_gemma.cli import main
from tests.cli.process import COMMAND, ROOT

pytestmark = pytest.mark.once


@pytest.fixture
def port():
    with contextlib.closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def ask(port, path, body=None, key="secret"):
    """Returns the response to a request. Errors are responses."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}",
        None if body is None else json.dumps(body).encode(),
        {"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
    )
    try:
        return urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        return error


def test_a_server_process(port, command_environment):
    """From the start over a request to a signal during a stream."""
    arguments = ["serve", "--port", str(port), "--served-name", "tiny", "--max-batch-size", "2"]
    environment = command_environment | {"KERAS_GEMMA_API_KEY": "secret"}
    process = subprocess.Popen(
        [*COMMAND, *arguments], env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None and time.monotonic() < deadline
            with contextlib.suppress(urllib.error.URLError), ask(port, "/ready") as response:
                if response.status == 200:
                    break
            time.sleep(0.05)
        body = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0}
        with ask(port, "/v1/chat/completions", body) as response:
            answer = json.load(response)
        assert answer["model"] == "tiny" and answer["choices"][0]["finish_reason"] == "stop"
        with ask(port, "/v1/models", key="wrong") as response:
            assert response.status == 401
        long = {"prompt": "A", "max_tokens": 250, "ignore_eos": True, "stream": True}
        with ask(port, "/v1/completions", long) as response:
            response.readline()
            process.send_signal(signal.SIGTERM)
            assert response.read().endswith(b"data: [DONE]\n\n")
        assert process.wait(20) == 0
    finally:
        process.kill()
        errors = process.communicate()[1]
    first, *lines = errors.splitlines()
    assert first == f"tiny: http://127.0.0.1:{port}"
    assert [json.loads(line)["status"] for line in lines] == [200, 401, 200]


def test_a_port_in_use(port):
    with contextlib.closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", port))
        sock.listen()
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1, port {port}"):
            main(["serve", "--port", str(port)])


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["--port", "70000"], "--port"),
        (["--api-key", ""], "--api-key"),
        (["--api-key-file", "nothing.txt"], "--api-key-file"),
        (["--ssl-keyfile", __file__], "--ssl-keyfile"),
        (["--max-batch-size", "0"], "--max-batch-size"),
        (["--drain", "-1"], "--drain"),
        (["--host", "0.0.0.0"], "--no-api-key"),
        (["--api-key", "a", "--no-api-key"], "--no-api-key"),
    ],
)
def test_wrong_usage(arguments, option, capsys):
    assert main(["serve", *arguments]) == 2
    assert option in capsys.readouterr().err


@pytest.mark.parametrize("value", ["", " "])
def test_an_empty_variable_is_not_a_server_without_a_key(value, monkeypatch, capsys):
    monkeypatch.setenv("KERAS_GEMMA_API_KEY", value)
    assert main(["serve"]) == 2
    assert "KERAS_GEMMA_API_KEY is empty" in " ".join(capsys.readouterr().err.split())


def test_a_file_without_keys(tmp_path, capsys):
    (tmp_path / "keys").write_text("\n \n")
    assert main(["serve", "--api-key-file", str(tmp_path / "keys")]) == 2
    assert "has no key" in capsys.readouterr().err


def test_missing_extra(monkeypatch):
    monkeypatch.setattr("keras_gemma.extras.is_installed", lambda package: package != "fastapi")
    with pytest.raises(ImportError, match=r'needs fastapi, .*".\[serve\]"'):
        main(["serve"])


def test_options_reach_the_server(monkeypatch, tmp_path):
    """Up to the engine and the server, which are replaced."""
    (tmp_path / "keys").write_text("one\ntwo\n")
    calls = {}

    def create(lm, **options):
        calls["engine"] = options
        return "texts"

    def run(texts, settings, sock, **options):
        sock.close()
        calls["settings"], calls["options"] = settings, options
        return 1

    monkeypatch.setattr("keras_gemma.cli.loading.load_model", lambda *arguments: None)
    monkeypatch.setattr("keras_gemma.causal_lm.text_engine.create_text_engine", create)
    monkeypatch.setattr("keras_gemma.serving.server.serve", run)
    arguments = ["--api-key", "zero", "--api-key-file", str(tmp_path / "keys"), "--pinned"]
    arguments += ["--host", "0.0.0.0", "--port", "0", "--max-queued-requests", "7"]
    arguments += ["--drain", "3", "--cors-origin", "*", "--root-path", "/gemma/"]
    assert main(["serve", "gemma_tiny_en", *arguments]) == 1
    settings = calls["settings"]
    assert settings.api_keys == ("zero", "one", "two") and settings.cors_origins == ("*",)
    assert settings.served_names == ("gemma_tiny_en",) and settings.drain_seconds == 3
    assert settings.warm_up and not settings.log_prompts
    assert calls["engine"] == {"pinned": True, "max_queued_requests": 7}
    assert calls["options"] == {"root_path": "/gemma"}
    assert main(["serve", "gemma_tiny_en", "--host", "0.0.0.0", "--port", "0", "--no-api-key"]) == 1
    assert calls["settings"].api_keys == ()

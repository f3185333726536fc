"""Example that serves a SavedModel over HTTP: its replies and errors."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROMPTS = ["It ran.", "Où"]

EXAMPLES = Path(__file__).parents[2] / "examples" / "exported"

PROGRAM = """
import runpy, sys
sys.modules["keras_gemma"] = None  # an ImportError
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def call():
    """Function of the example that calls a server."""
    specification = importlib.util.spec_from_file_location("call", EXAMPLES / "call_saved_model.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.call


@pytest.fixture(scope="module")
def served(on_tensorflow, folder):
    """Address of the example's server, which runs without this package."""
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    server = subprocess.Popen(
        [*command, str(EXAMPLES / "serve_saved_model.py"), str(folder), "--port", "0"],
        env={**os.environ, "PYTHONPATH": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        yield server.stdout.readline().split()[-1]
    finally:
        server.terminate()
        server.communicate()


def test_generate(lm, call, served):
    settings = {"max_new_tokens": 9, "stop": ["nowhere", "x"]}
    rows = call(f"{served}/generate", prompts=PROMPTS, **settings)["completions"]
    assert [row["text"] for row in rows] == lm.generate(PROMPTS, **settings)
    rows = call(f"{served}/generate", prompts=PROMPTS)["completions"]
    assert max(row["tokens"] for row in rows) == 6


def test_chat(lm, call, served):
    turns = [{"role": "user", "content": "Hi"}]
    answer = call(f"{served}/chat", messages=turns, max_new_tokens=9)
    assert answer["reply"] == lm.generate_chat(turns, max_new_tokens=9)


@pytest.mark.parametrize(
    ("path", "request_", "message"),
    [
        ("generate", {}, "`prompts` must be a list of strings"),
        ("generate", {"prompts": []}, "`prompts` must be a list of strings"),
        ("generate", {"prompts": "one"}, "`prompts` must be a list of strings"),
        ("generate", {"prompts": ["a"], "tempature": 1}, "Unknown: tempature"),
        ("generate", {"prompts": ["a"], "max_new_tokens": 1.5}, "must be an integer"),
        ("generate", {"prompts": ["a"], "max_new_tokens": True}, "must be an integer"),
        ("generate", {"prompts": ["a"], "max_new_tokens": 1 << 40}, "must fit into 32 bits"),
        (
            "generate",
            {"prompts": ["a"], "max_new_tokens": 0},
            "^`max_new_tokens` must be an integer >= 1. Received: 0$",
        ),
        ("generate", {"prompts": ["a"], "stop": "x"}, "a list of strings"),
        ("chat", {"messages": []}, "a list of objects with the strings"),
        ("chat", {"messages": [{"role": "model", "content": "a"}]}, "Roles must alternate"),
        ("nowhere", {}, "POST /generate"),
    ],
)
def test_invalid_requests(call, served, path, request_, message):
    with pytest.raises(ValueError, match=message):
        call(f"{served}/{path}", **request_)


def test_client_command(lm, served):
    script = [sys.executable, str(EXAMPLES / "call_saved_model.py")]
    done = subprocess.run(
        [*script, served, *PROMPTS, "--max-new-tokens", "5"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "".join(f"{text}\n" for text in lm.generate(PROMPTS, max_new_tokens=5))

"""Examples of docs/serve.md, with a running server."""

import gc
import importlib
import json
import re
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

PAGE = (Path(__file__).parents[2] / "docs/serve.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```py\n(.*?)```", PAGE, re.DOTALL)
CURL = re.findall(r"```sh\n(curl .*?)```", PAGE, re.DOTALL)
ADDRESS = "http://127.0.0.1:8000"
OUTPUTS = {
    'openai import OpenAI\n\nclient = OpenAI(base_url="URL/v1", api_key="none")\nmessages': (
        "r-i-v-e-r"
    ),
    "anthropic": "25",
    "langchain_openai": "25",
    "pydantic": "name=",
}
"""Part of an example to a part of its output."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    live = pytest.importorskip("tests.serving.live")
    from keras_gemma import GemmaCausalLM
    from keras_gemma.causal_lm import text_engine
    from keras_gemma.serving import ServerSettings

    lm = GemmaCausalLM.from_preset("gemma_tiny_instruct_en")
    texts = text_engine.create_text_engine(lm, max_batch_size=2)
    server = live.LiveServer(texts, ServerSettings(("gemma_tiny_instruct_en",)))
    yield server.url
    server.server.should_exit = True
    server.join()


def test_examples_exist():
    assert len(CURL) == 1 and len(PYTHON) == len(OUTPUTS) + 1


# Tools are too long for the model, and tested in test_tools.py.
@pytest.mark.parametrize("code", [code for code in PYTHON if "tools=" not in code])
def test_python(code, address, capsys):
    for module in re.findall(r"^from (\w+)", code, re.MULTILINE):
        pytest.importorskip(module)
    assert ADDRESS in code
    names: dict[str, object] = {}
    exec(compile(code.replace(ADDRESS, address), "docs/serve.md", "exec"), names)
    names.clear()
    with warnings.catch_warnings(action="ignore"):
        gc.collect()  # The clients close their connections.
    output = capsys.readouterr().out
    (expected,) = [value for part, value in OUTPUTS.items() if part in code.replace(ADDRESS, "URL")]
    assert expected in output


@pytest.mark.parametrize("command", CURL)
def test_curl(command, address):
    result = subprocess.run(
        ["bash", "-c", command.replace(ADDRESS, address)], capture_output=True, text=True
    )
    message = json.loads(result.stdout)["choices"][0]["message"]
    assert message["content"] == "r-i-v-e-r"


def test_options_of_the_page_exist():
    serve_options = importlib.import_module("tests.serving.test_deploy").serve_options()
    served = PAGE.partition("## Several machines")[0]
    used = set(re.findall(r"`(--[a-z-]+)", served)) | {"KERAS_GEMMA_API_KEY"}
    assert len(used) > 10 and used - serve_options == {"--help"} & used

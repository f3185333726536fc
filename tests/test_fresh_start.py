"""Code of README, pages and notebooks in new processes: no settings, and one framework only."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import keras
import pytest

from tests.test_examples import ROOT, examples, runs_here

pytestmark = pytest.mark.skipif(
    keras.config.backend() == "tensorflow", reason="`test_examples.py` runs them in this process"
)

OTHER = "torch" if keras.config.backend() == "jax" else "jax"
"""A framework that is hidden from the programs."""


def pages() -> list:
    """Returns the examples of README and pages that do without a second framework."""
    own = [example for example in examples() if example.id.startswith(("README", "docs"))]
    needs_another = ("tensorflow", "served_gemma", f'format="{OTHER}"')
    return [
        example for example in own if not any(name in example.values[0] for name in needs_another)
    ]


def imports_of_notebooks() -> list:
    """Returns the imports of each notebook, and what it sets before them, as test parameters."""
    parameters = []
    for path in sorted((ROOT / "examples").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        lines = []
        for cell in cells:
            if cell["cell_type"] == "code":
                for node in ast.parse("".join(cell["source"])).body:
                    source = ast.unparse(node)
                    if isinstance(node, ast.Import | ast.ImportFrom) or "environ." in source:
                        lines.append(source)
        parameters.append(pytest.param("\n".join(lines), id=path.stem))
    return parameters


@pytest.fixture(scope="module")
def run():
    """Returns a function that runs a program, and returns its error output if it failed."""
    command = [sys.executable, str(Path(__file__).with_name("one_framework.py"))]
    with subprocess.Popen(
        [*command, keras.config.backend()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:

        def run(program):
            print(json.dumps(program), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield run
        process.stdin.close()


def test_other_frameworks_are_hidden(run):
    assert f"No module named '{OTHER}'" in run(f"import {OTHER}")
    assert "No module named 'tensorflow'" in run("import keras")  # Keras's default
    assert run("import keras_gemma, keras; print(keras.config.backend())") == ""


@pytest.mark.parametrize("code", [example for i, example in enumerate(pages()) if runs_here(i)])
def test_page(code, run):
    assert run(code) == ""


@pytest.mark.parametrize("code", imports_of_notebooks())
def test_imports_of_notebook(code, run):
    """The cells themselves run in `test_examples.py`."""
    if keras.config.backend() == "jax" and "import torch" in code:
        pytest.skip("compares with transformers, which needs PyTorch")
    assert run(code) == ""

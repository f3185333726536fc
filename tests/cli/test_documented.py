"""The commands that README, docs and notebooks show are ones that the program takes."""

import json
import re
import shlex
from pathlib import Path

import pytest
import typer

from keras_gemma.cli.app import app

ROOT = Path(__file__).parents[2]


def commands():
    """Each `keras-gemma ...` in a block of shell, without what is piped in and out."""
    texts = [path.read_text("utf-8") for path in (ROOT / "README.md", *ROOT.glob("docs/**/*.md"))]
    for path in ROOT.glob("examples/*.ipynb"):
        cells = json.loads(path.read_text("utf-8"))["cells"]
        texts += ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    blocks = [block for text in texts for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = re.findall(r"(?m)(?:^|\| )keras-gemma (.*?)(?: \||$)", "\n".join(lines))
    return sorted(set(found))


def test_there_are_commands():
    assert len(commands()) > 10


@pytest.mark.parametrize("line", commands())
def test_a_command_parses(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, *arguments = shlex.split(line, comments=True)
    for argument in arguments:
        if "/" in argument:  # a folder of the reader's
            Path(argument).mkdir(parents=True)
    command = typer.main.get_command(app).commands[name]
    command.make_context(name, arguments)  # raises what is wrong with it

"""Commands in README, docs and notebooks have valid options."""

import json
import re
import shlex
from pathlib import Path

import pytest
import typer

from keras_gemma.cli.app import app

ROOT = Path(__file__).parents[2]


def commands():
    """Returns each `keras-gemma` command in a shell block, without pipes."""
    texts = [path.read_text("utf-8") for path in (ROOT / "README.md", *ROOT.glob("docs/**/*.md"))]
    for path in ROOT.glob("examples/*.ipynb"):
        cells = json.loads(path.read_text("utf-8"))["cells"]
        texts += ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    blocks = [block for text in texts for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return sorted(set(re.findall(r"(?m)(?:^|\| )keras-gemma (.*?)(?: \||$)", "\n".join(lines))))


def test_commands_exist():
    assert len(commands()) > 10


@pytest.mark.parametrize("line", commands())
def test_command_parses(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, *arguments = shlex.split(line, comments=True)
    for argument in arguments:
        if "/" in argument:  # a folder that must exist
            Path(argument).mkdir(parents=True)
    command = typer.main.get_command(app).commands[name]
    command.make_context(name, arguments)  # raises if an option is invalid

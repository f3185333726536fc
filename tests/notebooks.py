"""Runs the cells of a notebook in this process and saves their outputs.

`python -m tests.notebooks examples/look_inside.ipynb` does, without Jupyter. What a cell's last
line gives is shown as Jupyter would: as a picture, as HTML, or as it is written.
"""

import ast
import base64
import contextlib
import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

REAL_MODEL = "gemma3-270m"
"""Tag of cells that need the extra of this name. It is in the cells' metadata, as in Jupyter."""

EXAMPLES = Path(__file__).parents[1] / "examples"


def read_notebook(name: str) -> dict[str, Any]:
    """Returns a notebook of `examples`, as parsed JSON."""
    return json.loads((EXAMPLES / f"{name}.ipynb").read_text(encoding="utf-8"))


def execute(
    notebook: dict[str, Any],
    leave_out: str | None = None,
    changes: Mapping[str, str] = MappingProxyType({}),
) -> list[Any]:
    """Runs the cells, writes their outputs into `notebook`, and returns what the last lines gave.

    Args:
        notebook: The notebook, as parsed JSON.
        leave_out: Cells with this tag do not run and keep their outputs.
        changes: Replacements in the code that runs, such as fewer steps. Each must occur in it.
    """
    unused = set(changes)
    names: dict[str, Any] = {}
    shown = []
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells, start=1):
        if leave_out in cell["metadata"].get("tags", ()):
            continue
        source = "".join(cell["source"])
        for old, new in changes.items():
            if old in source:
                source = source.replace(old, new)
                unused.discard(old)
        tree = ast.parse(source)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(tree, f"cell {number}", "exec"), names)
            value = None
            if last is not None:
                value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names)
        cell["execution_count"] = number
        cell["outputs"] = []
        if printed.getvalue():
            lines = printed.getvalue().splitlines(keepends=True)
            cell["outputs"].append({"output_type": "stream", "name": "stdout", "text": lines})
        if value is not None:
            result = {"output_type": "execute_result", "execution_count": number, "metadata": {}}
            cell["outputs"].append({**result, "data": display(value)})
            shown.append(value)
    assert not unused, f"`changes` that occur in no cell: {unused}"
    return shown


def display(value: Any) -> dict[str, Any]:
    """`value` by MIME type, as a notebook keeps it."""
    data = {"text/plain": [repr(value)]}
    if hasattr(value, "savefig"):
        buffer = io.BytesIO()
        value.savefig(buffer, format="png", dpi=100, bbox_inches="tight")
        data["image/png"] = base64.b64encode(buffer.getvalue()).decode() + "\n"
    elif hasattr(value, "_repr_html_"):
        data["text/html"] = [value._repr_html_()]
        data["text/plain"] = [f"<{type(value).__name__}>"]
    return data


def printed(notebook: dict[str, Any]) -> list[str]:
    """Returns the texts that the cells of a notebook print."""
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    return ["".join(output["text"]) for output in outputs if "text" in output]


def kinds(notebook: dict[str, Any]) -> list[str]:
    """Returns the MIME types of the outputs of a notebook."""
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    return [kind for output in outputs for kind in output.get("data", {})]


if __name__ == "__main__":
    path = Path(sys.argv[1])
    loaded = json.loads(path.read_text(encoding="utf-8"))
    with contextlib.chdir(path.parent):
        execute(loaded)
    text = json.dumps(loaded, indent=1, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")

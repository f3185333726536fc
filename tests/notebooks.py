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
from pathlib import Path
from typing import Any


def execute(notebook: dict[str, Any]) -> list[Any]:
    """Run all cells, write their outputs into `notebook`, and return what the last lines gave."""
    names: dict[str, Any] = {}
    shown = []
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells, start=1):
        tree = ast.parse("".join(cell["source"]))
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


if __name__ == "__main__":
    path = Path(sys.argv[1])
    loaded = json.loads(path.read_text(encoding="utf-8"))
    execute(loaded)
    text = json.dumps(loaded, indent=1, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")

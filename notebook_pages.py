"""Hook of MkDocs that turns the notebooks of `examples/` into pages of the site.

A page has the cells and their saved outputs: nothing runs. Links between notebooks and pages work
in the repository, in Jupyter and on the site.
"""

import base64
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

EXAMPLES = Path(__file__).parent / "examples"
FOLDER = "notebooks"
"""Folder of the pages on the site."""

PAGE_TO_NOTEBOOK = re.compile(r"\]\(\.\./examples/(\w+)\.ipynb")
NOTEBOOK_TO_NOTEBOOK = re.compile(r"\]\((\w+)\.ipynb")
NOTEBOOK_TO_PAGE = re.compile(r"\]\(\.\./docs/")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds a page, its pictures and the notebook itself for each notebook."""
    for path in sorted(EXAMPLES.glob("*.ipynb")):
        text = path.read_text(encoding="utf-8")
        markdown, pictures = convert(json.loads(text), path.stem, config.repo_url)
        contents = {f"{path.stem}.md": markdown, path.name: text} | pictures
        for name, content in contents.items():
            files.append(File.generated(config, f"{FOLDER}/{name}", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Points links to notebooks in the repository to their pages."""
    if page.file.src_uri.startswith(f"{FOLDER}/"):
        return markdown
    return PAGE_TO_NOTEBOOK.sub(rf"]({FOLDER}/\1.md", markdown)


def convert(
    notebook: dict[str, Any], name: str, repo_url: str | None
) -> tuple[str, dict[str, bytes]]:
    """Returns a notebook as Markdown, and its pictures by file name."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for number, cell in enumerate(notebook["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            parts.append(fence(source, "python"))
            for output in cell["outputs"]:
                file = f"{name}_{number}.png"
                markdown, picture = convert_output(output, file)
                parts.append(markdown)
                pictures |= {file: picture} if picture else {}
        else:
            source = NOTEBOOK_TO_PAGE.sub("](../", source)
            parts.append(NOTEBOOK_TO_NOTEBOOK.sub(r"](\1.md", source))
        if number == 0:
            parts.append(links(name, repo_url))
    return "\n\n".join(parts) + "\n", pictures


def convert_output(output: dict[str, Any], file: str) -> tuple[str, bytes | None]:
    """Returns an output as Markdown, and its picture, which the Markdown calls `file`."""
    data = output.get("data", {})
    if "image/png" in data:
        return f"![Plot of the cell above]({file})", base64.b64decode("".join(data["image/png"]))
    if "text/html" in data:
        return "".join(data["text/html"]), None
    return fence("".join(output.get("text") or data["text/plain"]), 'text title="Output"'), None


def fence(text: str, language: str) -> str:
    """Returns a code block, whose fence is longer than any in the text."""
    ticks = max(map(len, re.findall(r"`+", text)), default=0) + 1
    return "\n".join(["`" * max(3, ticks) + language, text.rstrip("\n"), "`" * max(3, ticks)])


def links(name: str, repo_url: str | None) -> str:
    """Returns links to download the notebook and, from a public repository, to open it."""
    file = f"{name}.ipynb"
    options = [f"[Download the notebook]({file})"]
    if repo_url:
        path = f"{urlsplit(repo_url).path.strip('/')}/blob/main/examples/{file}"
        kaggle = "https://kaggle.com/kernels/welcome?src=https://github.com"
        options.append(f"[Open in Colab](https://colab.research.google.com/github/{path})")
        options.append(f"[Open in Kaggle]({kaggle}/{path})")
    return " · ".join(options)

"""Documentation: pages build, links and file names exist, and outputs and tables are true."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import keras_gemma
from keras_gemma.catalogue import presets
from keras_gemma.generation.memory import Workload, bytes_needed
from keras_gemma.storage.hub import errors

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))


def test_pages_build(tmp_path):
    pytest.importorskip("mkdocs")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    reference = "".join(page.read_text() for page in tmp_path.glob("reference/*/index.html"))
    headings = set(re.findall(r'<h[2-5] id="([\w.]+)"', reference))
    documented = {name.rsplit(".", 1)[-1] for name in headings}
    modules = {"models", "samplers", "tokenizers", "quantization", "scoring", "training"}
    modules.add("__version__")
    assert not {*keras_gemma.__all__, *keras_gemma.samplers.__all__} - modules - documented
    assert {"generate", "stream", "chat", "score", "quantize", "save_to_gguf"} <= documented
    pages = [page.read_text() for page in tmp_path.rglob("*.html")]
    assert not any("fonts.googleapis.com" in page for page in pages)
    check_notebook_pages(tmp_path)


def check_notebook_pages(site):
    """Every notebook is a page with its headings and pictures, and a file to download."""
    index = (site / "index.html").read_text()
    for path in (ROOT / "examples").glob("*.ipynb"):
        assert f'href="notebooks/{path.stem}/"' in index
        assert (site / "notebooks" / path.name).read_bytes() == path.read_bytes()
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        page = (site / "notebooks" / path.stem / "index.html").read_text()
        texts = ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]
        headings = re.findall(r"^#+ (.+)$", "\n".join(texts), re.MULTILINE)
        assert not [heading for heading in headings if heading not in page]
        outputs = [output for cell in cells for output in cell.get("outputs", [])]
        pictures = sum("image/png" in output.get("data", {}) for output in outputs)
        assert page.count('alt="Plot of the cell above"') == pictures
        assert len(list(site.glob(f"notebooks/{path.stem}_*.png"))) == pictures


def test_links_to_open_a_notebook():
    pytest.importorskip("mkdocs")
    import notebook_pages

    links = notebook_pages.links("prompting", "https://github.com/someone/something/")
    path = "someone/something/blob/main/examples/prompting.ipynb"
    assert f"(https://colab.research.google.com/github/{path})" in links
    assert f"(https://kaggle.com/kernels/welcome?src=https://github.com/{path})" in links
    assert "http" not in notebook_pages.links("prompting", None)


def test_notebooks_explain_their_pictures():
    """Text follows each picture."""
    for path in (ROOT / "examples").glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        for cell, after in zip(cells, [*cells[1:], None], strict=True):
            kinds = {kind for output in cell.get("outputs", []) for kind in output.get("data", {})}
            if kinds & {"image/png", "text/html"}:
                is_text = after is not None and after["cell_type"] == "markdown"
                assert is_text and after["source"][0][0] != "#", (path.name, cell["id"])


def test_readme_links_exist():
    targets = re.findall(r"\]\((?!http)([^)#]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(targets) > 8
    assert not [target for target in targets if not (ROOT / target).exists()]


def test_named_python_files_exist():
    """Checks every `*.py` in backticks, relative to the repository, the package or `examples/`."""
    missing = []
    for page in PAGES:
        for name in re.findall(r"`([\w/]+\.py)`", page.read_text(encoding="utf-8")):
            roots = (ROOT, ROOT / "keras_gemma", ROOT / "examples/exported")
            if not any((root / name).is_file() for root in roots):
                missing.append(f"{page.name}: {name}")
    assert not missing


def test_files_of_the_tree_exist():
    """Checks the annotated tree in docs/architecture.md."""
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    tree = page.split("```")[1]
    assert len(tree.splitlines()) > 50
    folders, missing = [ROOT], []
    for line in tree.strip().splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        for name in re.findall(r"(?<!\S)(?:\w+\.py|\w+\.toml|\w+\.yml|Makefile|\w+/)", line[:32]):
            path = folders[depth] / name
            if not path.exists():
                missing.append(str(path.relative_to(ROOT)))
            elif path.is_dir():
                folders[depth + 1 :] = [path]
    assert not missing


def test_readme_output(capsys):
    """The first example prints the output below it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code, output = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", text, re.DOTALL).groups()
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out == output


def test_readme_quotes_the_real_model():
    """The quoted text is in the saved output of `get_started`, which another test compares."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    notebook = (ROOT / "examples/get_started.ipynb").read_text(encoding="utf-8")
    (quoted,) = re.findall(r"^> (.+)$", text, re.MULTILINE)
    assert f'"{quoted}\\n"' in notebook


def test_supported_models():
    """The table of models in the README has the sizes of the catalogue."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|]+ \| `(\w+)`[^|]* \| (.+) \|$", text, re.MULTILINE)
    assert len(rows) == 11
    for name, cells in rows:
        config = presets()[name].config
        sizes = [config.weight_bytes(dtype) for dtype in ("bfloat16", "int8", "int4")]
        sizes.append(config.cache_bytes(1, config.context_length))
        expected = [f"{config.parameter_count / 1e9:.1f} B"]
        expected += [f"{size / 1e9:.2f}" for size in sizes]
        assert cells.split(" | ") == expected, name
    counts = {presets()[name].config.parameter_count for name, _ in rows}
    downloaded = [preset for preset in presets().values() if not preset.has_weights]
    assert {preset.config.parameter_count for preset in downloaded} == counts


def test_models_page():
    """Sizes, pages and licenses are those of the catalogue; errors are those of the package."""
    text = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    work = Workload(num_prompts=1, rows_per_prompt=1, prompt_length=1024, text_length=1280)
    rows = re.findall(r"^\| [^|]+ \| `(\w+)` \| ([\d. |]+) \|$", text, re.MULTILINE)
    for name, cells in rows:
        config = presets()[name].config
        generation = bytes_needed(work, config, "bfloat16")
        sizes = [config.weight_bytes("bfloat16")]
        sizes += [config.weight_bytes(d) + generation for d in ("bfloat16", "int8", "int4")]
        assert cells.split(" | ") == [f"{size / 1e9:.1f}" for size in sizes], name
    published = [preset for preset in presets().values() if preset.kaggle_handle]
    counts = {preset.config.parameter_count for preset in published}
    assert {presets()[name].config.parameter_count for name, _ in rows} == counts

    owner_and_model = r"\(https://www.kaggle.com/models/([^)]+)\)"
    license_url = r"\[[\w.-]+\]\(([^)]+)\)"
    pattern = rf"^\| [^|]+ \| \[.+\]{owner_and_model} \| \[(.+)\].* \| {license_url} \|$"
    pages = re.findall(pattern, text, re.MULTILINE)
    expected = {
        (handle.split("/")[0] + "/" + handle.split("/")[1], preset.license_url)
        for preset in published
        for handle in [preset.kaggle_handle.removeprefix("kaggle://")]
    }
    assert {(page, url) for page, _, url in pages} == expected
    handles = {preset.hugging_face_handle for preset in published}
    assert {f"hf://{repository}" for _, repository, _ in pages} <= handles

    quoted = re.findall(r"^\| `([^`]+)` \| (?:set|accept|check|connect)", text, re.MULTILINE)
    rules = errors.KAGGLE_DOWNLOAD + errors.HUGGING_FACE_DOWNLOAD
    assert len(quoted) == 5
    assert not [words for words in quoted if not any(words in advice for _, advice in rules)]


def test_kaggle_page():
    """Memory is that of the catalogue: one T4 in float32, and a part of bfloat16 weights."""
    text = (ROOT / "docs/kaggle.md").read_text(encoding="utf-8")
    work = Workload(num_prompts=1, rows_per_prompt=1, prompt_length=1024, text_length=1280)
    rows = re.findall(r"^\| `([\w.]+)` \| ([\d. |]+) \|$", text, re.MULTILINE)
    assert len(rows) > 8
    for name, cells in rows:
        config = presets()[name].config
        generation = {dtype: bytes_needed(work, config, dtype) for dtype in ("float32", "bfloat16")}
        sizes = [
            config.weight_bytes(d) + generation["float32"] for d in ("float32", "int8", "int4")
        ]
        sizes += [config.weight_bytes("bfloat16") / n + generation["bfloat16"] for n in (2, 8)]
        assert cells.split(" | ") == [f"{size / 1e9:.1f}" for size in sizes], name
    for handle in re.findall(r"/kaggle/input/models/(\S+)", text):
        assert f"kaggle://{handle}" in {preset.kaggle_handle for preset in presets().values()}


def test_pages_begin_with_their_use():
    for page in PAGES[1:]:
        text = page.read_text(encoding="utf-8")
        if not text.startswith("--8<--"):
            first = text.split("\n\n")[1]
            assert first.startswith("This page shows how to "), f"{page.name}: {first}"

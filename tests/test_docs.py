"""Documentation: pages build, links and file names exist, and outputs and tables are true."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import keras_gemma
from keras_gemma.catalogue import presets

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


def test_pages_begin_with_their_use():
    for page in PAGES[1:]:
        text = page.read_text(encoding="utf-8")
        if not text.startswith("--8<--"):
            first = text.split("\n\n")[1]
            assert first.startswith("This page shows how to "), f"{page.name}: {first}"

"""The pages build, no link leads nowhere, and the reference says what the docstrings say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import keras
import pytest

import keras_gemma

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(keras.config.backend() != "jax", reason="the pages know no backend")
def test_the_pages_build(tmp_path):
    pytest.importorskip("mkdocs")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    reference = "".join(page.read_text() for page in tmp_path.glob("reference/*/index.html"))
    named = set(re.findall(r'<h[2-5] id="([\w.]+)"', reference))
    documented = {name.rsplit(".", 1)[-1] for name in named}
    modules = {"models", "samplers", "tokenizers", "quantization", "__version__"}
    assert not {*keras_gemma.__all__, *keras_gemma.samplers.__all__} - modules - documented
    assert {"generate", "stream", "chat", "score", "quantize", "save_to_gguf"} <= documented
    pages = [page.read_text() for page in tmp_path.rglob("*.html")]
    assert not any("fonts.googleapis.com" in page for page in pages)


def test_the_readme_links_to_what_is_there():
    targets = re.findall(r"\]\((?!http)([^)#]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(targets) > 8
    assert not [target for target in targets if not (ROOT / target).exists()]

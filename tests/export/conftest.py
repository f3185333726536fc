"""One model and its SavedModel, for all tests of this folder."""

import contextlib

import keras
import pytest

from tests.models import make_lm, quickly


@pytest.fixture(scope="module")
def quick():
    """Leaves XLA on in TensorFlow, because a SavedModel holds what XLA compiles."""
    with contextlib.nullcontext() if keras.config.backend() == "tensorflow" else quickly():
        yield


@pytest.fixture(scope="session")
def lm(tiny_proto):
    """A model with sliding windows, soft caps and grouped heads."""
    return make_lm("gemma2_grouped", tiny_proto)


@pytest.fixture(scope="session")
def folder(lm, tmp_path_factory):
    """SavedModel of `lm`, exported in a subprocess if the backend is not TensorFlow."""
    pytest.importorskip("tensorflow_text")
    folder = tmp_path_factory.mktemp("exports") / "served"
    lm.export(folder, max_new_tokens=6)
    return folder


@pytest.fixture(scope="session")
def on_tensorflow():
    """Skips tests of the graph on other backends, because the graph does not depend on them."""
    if keras.config.backend() != "tensorflow":
        pytest.skip("the test does not depend on the backend that exports")

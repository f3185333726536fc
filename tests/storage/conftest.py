"""Models of KerasHub and of this package with random weights, and comparisons."""

import shutil

import keras
import numpy as np
import pytest
from keras import ops

from keras_gemma.config import GemmaConfig
from keras_gemma.model.backbone import GemmaBackbone
from keras_gemma.presettable import Presettable
from keras_gemma.storage.formats import save_as
from keras_gemma.text.preprocessor import GemmaCausalLMPreprocessor
from keras_gemma.text.tokenizer import GemmaTokenizer
from tests.configurations import GEMMA1

IDS = np.array([[2, 9, 31, 8, 300, 77, 5, 140, 11, 12], [2, 400, 3, 17, 17, 60, 211, 4, 90, 1]])
"""Token ids, longer than any window of `configurations.py`, without padding."""


class Task(Presettable):
    """Minimal task: the parts of `GemmaCausalLM` that reading and writing files need."""

    backbone_cls = GemmaBackbone
    preprocessor_cls = GemmaCausalLMPreprocessor

    def __init__(self, backbone, preprocessor=None, name="task"):
        self.backbone = backbone
        self.preprocessor = preprocessor
        self.name = name


def save_to_hugging_face(task, directory, **options):
    save_as(task, "hugging_face", directory, **options)


def randomize(weights, seed=0):
    """Assigns random bfloat16 values to all weights. Norms would start at zero."""
    random = np.random.default_rng(seed)
    for weight in weights:
        value = random.normal(0.0, 0.2, tuple(weight.shape)).astype("float32")
        weight.assign(ops.convert_to_numpy(ops.cast(value, "bfloat16")).astype("float32"))


def make_backbone(configuration, dtype="float32"):
    backbone = GemmaBackbone(**configuration, dtype=dtype)
    randomize(backbone.named_weights().values())
    return backbone


def make_keras_hub_backbone(configuration, dtype="float32"):
    import keras_hub

    config = GemmaConfig(**configuration)
    cls = getattr(keras_hub.models, f"{config.family}Backbone")
    backbone = cls(**config.to_keras_hub(), dtype=dtype)
    randomize(backbone.weights)
    return backbone


def make_task(configuration, proto, dtype="float32"):
    preprocessor = GemmaCausalLMPreprocessor(GemmaTokenizer(proto), sequence_length=24)
    return Task(make_backbone(configuration, dtype), preprocessor)


def outputs(backbone):
    """Returns hidden states and logits for `IDS`, as float32 arrays."""
    hidden = backbone({"token_ids": IDS, "padding_mask": np.ones_like(IDS)})
    logits = backbone.token_embedding(hidden, reverse=True)
    return [ops.convert_to_numpy(ops.cast(x, "float32")) for x in (hidden, logits)]


def assert_close(actual, expected):
    """Asserts that differences are below 1e-4 of the largest value."""
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max())


def assert_same_weights(actual, expected):
    """Asserts that all weights of two backbones are equal."""
    actual, expected = actual.named_weights(), expected.named_weights()
    assert list(actual) == list(expected)
    for name in expected:
        np.testing.assert_array_equal(
            actual[name].numpy().astype("float32"),
            expected[name].numpy().astype("float32"),
            err_msg=name,
        )


@pytest.fixture(scope="session")
def saved_preset(tmp_path_factory, tiny_proto):
    """A Keras preset with the sizes of `GEMMA1`. Tests must not change it."""
    folder = tmp_path_factory.mktemp("saved") / "preset"
    make_task(GEMMA1, tiny_proto).save_to_preset(folder)
    return folder


@pytest.fixture
def preset(saved_preset, tmp_path):
    """A copy of `saved_preset`."""
    return shutil.copytree(saved_preset, tmp_path / "preset")


@pytest.fixture(autouse=True)
def default_policy():
    yield
    keras.config.set_dtype_policy("float32")

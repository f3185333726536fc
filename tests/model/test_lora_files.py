"""Adapters in Keras files and in presets."""

import keras
import numpy as np
import pytest

from keras_gemma import GemmaBackbone, GemmaConfig, QuantizationConfig
from tests.configurations import GEMMA1, GEMMA2
from tests.lora_values import fill, largest, run
from tests.parity.pairs import make_ours

CONFIG = GemmaConfig(**GEMMA2)
FOUR = QuantizationConfig("int4", 16, embedding="int4")


@pytest.mark.parametrize("mode", [None, "int8"])
def test_keras_files(mode, tmp_path):
    backbone = make_ours(GEMMA2)
    backbone.enable_lora(2, dropout=0.1, alpha=3, name="first")
    fill(backbone, "first")
    backbone.enable_lora(3, "down", name="second")
    if mode:
        backbone.quantize(mode)
    backbone.set_adapter("first")
    backbone.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.lora_adapters == ["first", "second"] and again.active_adapter == "first"
    assert again.adapters.configs == backbone.adapters.configs
    assert len(again.trainable_variables) == len(backbone.trainable_variables)
    np.testing.assert_array_equal(run(again), run(backbone))
    again.set_adapter(None), backbone.set_adapter(None)
    np.testing.assert_array_equal(run(again), run(backbone))


def test_keras_file_of_a_merged_model(tmp_path):
    backbone = make_ours(GEMMA1)
    backbone.enable_lora(2)
    fill(backbone)
    expected = run(backbone)
    backbone.merge_lora()
    backbone.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.lora_adapters == []
    assert largest(run(again), expected) < 1e-5


def test_weights_files(tmp_path):
    path = tmp_path / "model.weights.h5"
    backbone = make_ours(GEMMA1)
    backbone.enable_lora(2)
    fill(backbone)
    backbone.save_weights(path)
    merged, other = GemmaBackbone(**GEMMA1), GemmaBackbone(**GEMMA1)
    merged.load_weights(path)
    np.testing.assert_allclose(run(merged), run(backbone), atol=1e-5)
    other.enable_lora(2, name="other")
    with pytest.raises(ValueError, match=r"adapters \['default'\], but the model has \['other'\]"):
        other.load_weights(path)
    other.delete_adapter("other")
    other.enable_lora(2)
    other.load_weights(path)
    np.testing.assert_array_equal(run(other), run(backbone))


def test_presets_hold_the_merged_model(tmp_path):
    backbone = make_ours(GEMMA2)
    plain = run(backbone)
    backbone.enable_lora(4, "all-linear")
    fill(backbone)
    backbone.save_to_preset(tmp_path / "merged")
    backbone.set_adapter(None)
    backbone.save_to_preset(tmp_path / "base")
    backbone.set_adapter("default")
    assert largest(run(GemmaBackbone.from_preset(tmp_path / "merged")), run(backbone)) < 1e-5
    assert largest(run(GemmaBackbone.from_preset(tmp_path / "base")), plain) < 1e-6


def test_updates_are_not_merged_into_a_model_with_adapters(tmp_path):
    path = tmp_path / "model.weights.h5"
    backbone = make_ours(GEMMA1)
    backbone.enable_lora(2, "all-linear")
    fill(backbone)
    backbone.save_weights(path)
    other = GemmaBackbone(**GEMMA1)
    other.enable_lora(2)  # on queries and values
    with pytest.raises(ValueError, match=r"has the adapters \['default'\], but the model has \[\]"):
        other.load_weights(path)

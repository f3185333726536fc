"""Keras model features (files, config, summary, stateless calls) and presets."""

import re

import keras
import numpy as np
import pytest
from keras import ops

from keras_gemma import GemmaBackbone, GemmaCausalLM, catalogue, samplers
from keras_gemma.backend import uninitialized
from tests.models import compile_lm, make_lm, on_torch

IDS = np.array([[2, 9, 31, 8, 300, 77, 5], [2, 400, 3, 17, 60, 0, 0]], "int32")
INPUTS = {"token_ids": IDS, "padding_mask": (IDS != 0).astype("int32")}


def logits(model):
    return ops.convert_to_numpy(model(INPUTS))


@pytest.fixture
def lm(tiny_proto):
    return make_lm("gemma2_grouped", tiny_proto)


def test_keras_files(lm, tmp_path):
    lm.compile(optimizer=keras.optimizers.Adam(3e-4), sampler=samplers.TopKSampler(k=7, seed=1))
    lm.save(tmp_path / "lm.keras")
    loaded = keras.saving.load_model(tmp_path / "lm.keras")
    assert type(loaded) is GemmaCausalLM
    np.testing.assert_array_equal(logits(loaded), logits(lm))
    assert loaded.sampler == lm.sampler
    assert float(loaded.optimizer.learning_rate) == pytest.approx(3e-4)
    text = "To be, or not"
    assert loaded.preprocessor.sequence_length == 32
    for ours, theirs in zip(lm.preprocessor([text]), loaded.preprocessor([text]), strict=True):
        keras.tree.map_structure(np.testing.assert_array_equal, ours, theirs)


def test_keras_files_after_training(lm, tmp_path):
    lm.fit(["To be, or not to be"] * 2, batch_size=2, verbose=0)
    lm.save(tmp_path / "lm.keras")
    loaded = keras.saving.load_model(tmp_path / "lm.keras")
    assert int(loaded.optimizer.iterations) == 1
    np.testing.assert_array_equal(logits(loaded), logits(lm))
    loaded.fit(["To be, or not to be"] * 2, batch_size=2, verbose=0)
    assert int(loaded.optimizer.iterations) == 2


def test_weights_files(lm, tmp_path):
    lm.save_weights(tmp_path / "lm.weights.h5")
    other = make_lm("gemma2_grouped")
    for weight in other.backbone.named_weights().values():
        weight.assign(np.zeros(weight.shape, "float32"))
    other.load_weights(tmp_path / "lm.weights.h5")
    np.testing.assert_array_equal(logits(other), logits(lm))


@pytest.mark.parametrize("with_text", [True, False])
def test_config(lm, with_text):
    if not with_text:
        lm.preprocessor = None
    copy = GemmaCausalLM.from_config(lm.get_config())
    assert copy.backbone.config == lm.backbone.config
    assert copy.name == lm.name
    assert (copy.preprocessor is not None) == with_text


def test_summary(lm, capsys):
    lm.summary()
    shown = capsys.readouterr().out
    assert "gemma_backbone" in shown
    assert f"{lm.backbone.config.parameter_count:,}" in shown
    assert "Preprocessor" in shown and "(GemmaTokenizer)" in shown
    assert f"Vocab size: {lm.preprocessor.tokenizer.vocabulary_size():,}" in shown
    assert lm.count_params() == lm.backbone.count_params() == lm.backbone.config.parameter_count


@pytest.mark.once
def test_summary_of_a_large_model(monkeypatch):
    """No number is cut in a terminal of 80 columns."""
    sizes = catalogue.presets()["gemma2_27b_en"].config.to_dict()
    with uninitialized():
        backbone = GemmaBackbone(**sizes | {"num_layers": 1}, dtype="bfloat16")
    monkeypatch.setenv("COLUMNS", "80")
    lines = []
    backbone.summary(print_fn=lines.append)
    text = "\n".join(lines)
    assert f"{sizes['vocabulary_size'] * sizes['hidden_dim']:,}" in text
    assert not re.search(r",\d*…", text)


def test_outputs(lm):
    assert lm.output_shape == (None, None, 512)
    result = lm(INPUTS)
    assert keras.backend.standardize_dtype(result.dtype) == "float32"
    hidden = lm.backbone(INPUTS)
    expected = lm.backbone.token_embedding(hidden, reverse=True)
    np.testing.assert_allclose(logits(lm), ops.convert_to_numpy(expected), atol=1e-6)


def test_stateless_call(lm):
    trainable = [v.value for v in lm.trainable_variables]
    other = [v.value for v in lm.non_trainable_variables]
    result, _ = lm.stateless_call(trainable, other, INPUTS)
    np.testing.assert_allclose(ops.convert_to_numpy(result), logits(lm), atol=1e-5)
    zeros, _ = lm.stateless_call([0 * value for value in trainable], other, INPUTS)
    assert not ops.convert_to_numpy(zeros).any()


@pytest.mark.skipif(keras.config.backend() != "jax", reason="JAX's own transformations")
def test_jax_transformations(lm):
    import jax

    other = [v.value for v in lm.non_trainable_variables]

    @jax.jit
    @jax.grad
    def gradients(trainable):
        return (lm.stateless_call(trainable, other, INPUTS)[0] ** 2).mean()

    result = gradients([v.value for v in lm.trainable_variables])
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in result)


@pytest.mark.skipif(not on_torch(), reason="PyTorch's own modules")
def test_it_is_a_torch_module(lm):
    import torch

    assert isinstance(lm, torch.nn.Module)
    count = sum(parameter.numel() for parameter in lm.parameters())
    assert count == lm.backbone.config.parameter_count
    (lm(INPUTS) ** 2).mean().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in lm.parameters())
    state = {key: value.clone() for key, value in lm.state_dict().items()}
    expected = logits_without_gradient(lm)
    lm.load_state_dict({key: torch.zeros_like(value) for key, value in state.items()})
    assert not logits_without_gradient(lm).any()
    lm.load_state_dict(state)
    np.testing.assert_array_equal(logits_without_gradient(lm), expected)


def logits_without_gradient(lm):
    return ops.convert_to_numpy(ops.stop_gradient(lm(INPUTS)))


def test_presets(lm, tmp_path):
    text = lm.generate("To be, or", max_new_tokens=12)
    lm.save_to_preset(tmp_path / "preset")
    loaded = GemmaCausalLM.from_preset(tmp_path / "preset")
    compile_lm(loaded)
    assert loaded.generate("To be, or", max_new_tokens=12) == text
    assert loaded.preprocessor.sequence_length == 32
    np.testing.assert_array_equal(logits(loaded), logits(lm))
    bare = GemmaCausalLM.from_preset(tmp_path / "preset", preprocessor=None)
    assert bare.preprocessor is None

"""LoRA adapters in the whole model: generation, scoring and training."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_gemma import GemmaCausalLM, QuantizationConfig
from keras_gemma.model.backbone import GemmaBackbone
from tests.conftest import TEXTS
from tests.lora_values import fill
from tests.models import compile_lm, make_backbone, make_lm

PROMPTS = [[2, 7, 9, 31, 400, 5], [2, 300, 17]]
IDS = np.array([[2, 9, 31, 8, 300, 77, 5, 140, 11, 12]])
TEXT = "First Citizen:\nBefore we proceed any further, hear me speak."


@pytest.fixture(scope="module")
def pair():
    """Quantized model with an active adapter, and its plain twin with the adapter merged."""
    lm = make_lm(num_layers=1)
    lm.quantize("int8")
    lm.enable_lora(2, targets="query", name="other")
    fill(lm.backbone, "other", 5, 1.0)
    lm.generate(PROMPTS, max_new_tokens=4, stop_token_ids=None)
    lm.enable_lora(2, targets="all-linear", name="default")
    fill(lm.backbone)
    twin = GemmaCausalLM(GemmaBackbone(**lm.backbone.config.to_dict(), dtype="float32"))
    for name, weight in lm.backbone.named_weights().items():
        twin.backbone.named_weights()[name].assign(weight.numpy())
    compile_lm(twin)
    return lm, twin


@pytest.mark.parametrize("sampler", ["beam", "guessed"])
def test_generate(sampler, pair):
    options = {"draft": "prompt"} if sampler == "guessed" else {"sampler": sampler, "seed": 3}
    texts = [lm.generate(PROMPTS, max_new_tokens=12, stop_token_ids=None, **options) for lm in pair]
    assert texts[0] == texts[1]


def test_switching(pair):
    lm, twin = pair
    options = {"max_new_tokens": 8, "stop_token_ids": None}
    on = lm.generate(PROMPTS[:1], **options)
    assert on == twin.generate(PROMPTS[:1], **options)
    prefix = lm.prefill(PROMPTS[0])
    lm.set_adapter(None)
    base = lm.generate(PROMPTS[:1], **options)
    with pytest.raises(ValueError, match="computed with other weights"):
        lm.generate(PROMPTS[:1], prefix=prefix, **options)
    lm.set_adapter("other")
    other = lm.generate(PROMPTS[:1], **options)
    lm.set_adapter("default")
    assert lm.generate(PROMPTS[:1], prefix=prefix, **options) == on
    assert len({tuple(rows[0]) for rows in (on, base, other)}) == 3


def test_score(pair):
    result, expected = (ops.convert_to_numpy(lm.score(IDS)) for lm in pair)
    atol = 1e-4 * np.abs(expected).max()
    np.testing.assert_allclose(result, expected, atol=atol)
    hooked = pair[0].score(IDS, hooks={"embeddings": lambda x, name: x})
    np.testing.assert_allclose(ops.convert_to_numpy(hooked), expected, atol=atol)


@pytest.mark.parametrize("quantization", [None, "int4"])
def test_training(quantization):
    """Float32 adapters train on a bfloat16 or quantized base model."""
    lm = GemmaCausalLM.from_preset("gemma_tiny_en", dtype="bfloat16", quantization=quantization)
    base = {v.path: ops.convert_to_numpy(v.value) for v in lm.backbone.weights}
    lm.enable_lora(4, targets=["query", "down"], dropout=0.05)
    lm.compile(optimizer=keras.optimizers.Adam(5e-3))
    batch = lm.preprocessor([TEXT], sequence_length=24)
    losses = [float(lm.train_on_batch(*batch)[0]) for _ in range(20)]
    assert losses[-1] < 0.7 * losses[0]
    assert {v.dtype for v in lm.trainable_variables} == {"float32"}
    for variable in lm.backbone.weights:
        if variable.path in base:
            np.testing.assert_array_equal(ops.convert_to_numpy(variable.value), base[variable.path])
    assert all(b.any() for _, b in lm.adapters.arrays("default").values())


def gradients(lm, x, y):
    """Returns the gradients, read from one step of plain gradient descent."""
    before = lm.adapters.arrays("default")
    lm.compile(optimizer=keras.optimizers.SGD(1.0))
    lm.train_on_batch(x, y)
    after = lm.adapters.arrays("default")
    return {n: [p - q for p, q in zip(after[n], before[n], strict=True)] for n in after}


@pytest.mark.parametrize("mode", ["int8", QuantizationConfig("int4", 16)], ids=["int8", "int4"])
def test_gradients_through_quantized_bases(mode):
    """The gradients equal those of a plain model with the same values."""
    lm, twin = (GemmaCausalLM(make_backbone(num_layers=1)) for _ in range(2))
    lm.quantize(mode)
    for name, weight in twin.backbone.named_weights().items():
        weight.assign(lm.backbone.named_weights()[name].numpy())
    x = {"token_ids": IDS, "padding_mask": np.ones_like(IDS)}
    result = []
    for model in (lm, twin):
        model.enable_lora(2, targets="all-linear")
        fill(model.backbone)
        result.append(gradients(model, x, np.roll(IDS, -1)))
    for name, pair in result[1].items():
        for part, expected in zip(result[0][name], pair, strict=True):
            np.testing.assert_allclose(part, expected, atol=1e-3 * np.abs(expected).max())


def test_optimizer_follows_the_adapter(tiny_proto):
    lm = make_lm(proto=tiny_proto, sequence_length=16, num_layers=1)
    lm.compile(optimizer=keras.optimizers.Adam(1e-3))
    options = {"batch_size": 2, "verbose": 0}
    optimizer, chosen = lm.optimizer, lm.adapters.activate
    lm.fit(TEXTS[:2], **options)
    lm.enable_lora(2, name="first")
    assert len(optimizer.variables) == 2  # moments of the base are freed at once
    in_fit = keras.callbacks.LambdaCallback(on_train_batch_end=lambda *_, logs: chosen(None))
    with pytest.raises(ValueError, match="activate another adapter when `fit` has"):
        lm.fit(TEXTS[:2], callbacks=[in_fit], **options)
    lm.set_adapter(None)
    lm.set_adapter("first")
    lm.fit(TEXTS[:2], **options)
    assert int(lm.optimizer.iterations) == 2 and lm.optimizer is optimizer
    first = lm.adapters.arrays("first")
    lm.enable_lora(2, name="second")
    lm.fit(TEXTS[:2], **options)
    assert int(lm.optimizer.iterations) == 1
    assert float(lm.optimizer.learning_rate) == pytest.approx(1e-3)
    for name, (_, b) in lm.adapters.arrays("second").items():
        assert b.any()
        np.testing.assert_array_equal(lm.adapters.arrays("first")[name][1], first[name][1])
    lm.quantize("int8")
    assert int(lm.optimizer.iterations) == 1  # it trains the adapter still
    lm.fit(TEXTS[:2], **options)
    assert int(lm.optimizer.iterations) == 2


def test_nothing_to_train(tiny_proto):
    lm = make_lm(proto=tiny_proto)
    lm.enable_lora()
    lm.set_adapter(None)
    with pytest.raises(ValueError, match=r"no adapter is active.*'default'"):
        lm.fit(TEXTS[:2])
    lm.set_adapter("default")
    with pytest.raises(ValueError, match="an export cannot hold adapters"):
        lm.export("nowhere")
    lm.merge_lora()
    with pytest.raises(ValueError, match=r"'default' is merged, so training it"):
        lm.train_on_batch(TEXTS[:2])


def test_keras_files_after_training(tiny_proto, tmp_path):
    lm = make_lm(proto=tiny_proto, sequence_length=16, num_layers=1)
    lm.enable_lora(2, dropout=0.1)
    lm.compile(optimizer=keras.optimizers.Adam(1e-2))
    lm.fit(TEXTS[:2], batch_size=2, verbose=0)
    lm.save(tmp_path / "lm.keras")
    again = keras.saving.load_model(tmp_path / "lm.keras")
    assert int(again.optimizer.iterations) == 1 and again.active_adapter == "default"
    np.testing.assert_array_equal(*(ops.convert_to_numpy(m.score(IDS)) for m in (lm, again)))
    again.fit(TEXTS[:2], batch_size=2, verbose=0)
    assert int(again.optimizer.iterations) == 2


@pytest.mark.once
def test_default_layers():
    lm, twin = make_lm(num_layers=1), make_lm(num_layers=1)
    lm.enable_lora(2)
    names = twin.backbone.default_lora_layer_names()
    twin.backbone.enable_lora(2, target_layer_names=names)
    adapted = [model.adapters.configs["default"].sizes.keys() for model in (lm, twin)]
    assert adapted[0] == adapted[1] and names == twin.backbone.get_lora_target_names()

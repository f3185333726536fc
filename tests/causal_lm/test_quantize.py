"""A quantized model generates, scores and predicts like a plain one with the same values."""

import gc
import weakref

import keras
import numpy as np
import pytest
from keras import ops

from keras_gemma import GemmaCausalLM, QuantizationConfig, catalogue
from keras_gemma.model.backbone import GemmaBackbone
from keras_gemma.quantization import report
from tests.configurations import VOCABULARY_SIZE
from tests.models import compile_lm, make_backbone, make_lm

FOUR = QuantizationConfig("int4", 16, embedding="int4")
PROMPTS = [[2, 7, 9, 31, 400, 5], [2, 300, 17]]
IDS = np.array([[2, 9, 31, 8, 300, 77, 5, 140, 11, 12]])


@pytest.fixture(scope="module", params=["int8", FOUR], ids=["int8", "int4"])
def pair(request):
    """Model quantized after its first generation, and its plain twin."""
    lm = make_lm(num_layers=1)
    before = lm.generate(PROMPTS, max_new_tokens=8, stop_token_ids=None)
    lm.predict({"token_ids": IDS, "padding_mask": np.ones_like(IDS)}, verbose=0)
    lm.quantize(request.param)
    assert lm.generate(PROMPTS, max_new_tokens=8, stop_token_ids=None) != before or (
        request.param == "int8"
    )
    backbone = GemmaBackbone(**lm.backbone.config.to_dict(), dtype="float32")
    for name, weight in lm.backbone.named_weights().items():
        backbone.named_weights()[name].assign(weight.numpy())
    twin = GemmaCausalLM(backbone)
    compile_lm(twin)
    return lm, twin


@pytest.mark.parametrize(
    "settings",
    [
        {"sampler": "greedy"},
        {"sampler": "random", "seed": 3},
        {"sampler": "top_k", "seed": 3},
        {"sampler": "top_p", "seed": 3},
        {"sampler": "min_p", "seed": 3},
        {"sampler": "beam"},
        {"sampler": "contrastive"},
        {"sampler": "greedy", "draft": "prompt"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_generate(settings, pair):
    result, expected = (
        lm.generate(PROMPTS, max_new_tokens=12, stop_token_ids=None, **settings) for lm in pair
    )
    assert result == expected


def test_score_and_predict(pair):
    lm, twin = pair
    seen = []

    def hook(x, layer):
        seen.append(layer)
        return x

    result = ops.convert_to_numpy(lm.score(IDS, layer_intercept_fn=hook))
    expected = ops.convert_to_numpy(twin.score(IDS))
    assert seen == list(range(-1, lm.backbone.config.num_layers))
    atol = 1e-4 * np.abs(expected).max()
    np.testing.assert_allclose(result, expected, atol=atol)
    inputs = {"token_ids": IDS, "padding_mask": np.ones_like(IDS)}
    np.testing.assert_allclose(lm.predict(inputs, verbose=0), expected, atol=atol)


def test_nothing_to_train(pair):
    lm, _ = pair
    x = {"token_ids": IDS, "padding_mask": np.ones_like(IDS)}
    for train in (lm.fit, lm.train_on_batch):
        with pytest.raises(ValueError, match=r"Nothing of this model can be trained.*Train in flo"):
            train(x, IDS)
    assert np.isfinite(lm.evaluate(x, IDS, verbose=0)).all()


def test_quantizing_twice(pair):
    lm, _ = pair
    with pytest.raises(ValueError, match=r"quantized already.*mode='int8'"):
        lm.quantize("int8")
    with pytest.raises(ValueError, match="quantized already"):
        lm.quantize("int4", group_size=16, calibration=PROMPTS)


def test_quantizing_only_the_backbone():
    """The model around the backbone drops its compiled programs and old weights."""
    lm, other = make_lm(num_layers=1), make_lm(num_layers=1)
    inputs = {"token_ids": IDS, "padding_mask": np.ones_like(IDS)}
    for model in (lm, other):
        model.predict(inputs, verbose=0)
        model.generate(PROMPTS, max_new_tokens=4, stop_token_ids=None)
        model.score(IDS)
    prefix = lm.prefill(PROMPTS[0][:3])
    lm.backbone.quantize(FOUR)
    other.quantize(FOUR)
    for method in ("predict", "score"):
        arguments = (inputs,) if method == "predict" else (IDS,)
        options = {"verbose": 0} if method == "predict" else {}
        result, expected = (
            ops.convert_to_numpy(getattr(model, method)(*arguments, **options))
            for model in (lm, other)
        )
        np.testing.assert_array_equal(result, expected)
    texts = (m.generate(PROMPTS, max_new_tokens=4, stop_token_ids=None) for m in (lm, other))
    assert next(texts) == next(texts)
    with pytest.raises(ValueError, match="other weights"):
        lm.generate(PROMPTS[:1], max_new_tokens=4, prefix=prefix)


def test_backbone_calibrates_with_ids():
    lm, backbone = make_lm(), make_lm().backbone
    lm.quantize(FOUR, calibration=PROMPTS)
    backbone.quantize(FOUR, calibration=PROMPTS)
    for name, weight in lm.backbone.named_weights().items():
        np.testing.assert_array_equal(backbone.named_weights()[name].numpy(), weight.numpy())
    for calibration, says in (
        (["a text"], "lists of token ids"),
        ([[-1]], "ids from 0 to"),
    ):
        with pytest.raises(ValueError, match=says):
            make_lm().backbone.quantize("int8", calibration=calibration)


def test_nothing_of_the_backbone_to_train(pair):
    backbone = pair[0].backbone
    x = {"token_ids": IDS, "padding_mask": np.ones_like(IDS)}
    for train in (backbone.fit, backbone.train_on_batch):
        with pytest.raises(ValueError, match="Nothing of this model can be trained"):
            train(x, np.zeros((1, 10, 32)))


def test_unknown_mode():
    lm = make_lm()
    with pytest.raises(ValueError, match="`mode` must be one of 'int8', 'int4'"):
        lm.quantize("awq")
    assert lm.backbone.quantization is None


def kl(lm, twin, ids):
    """Returns the mean KL divergence of `twin` from `lm` over all positions, in nats."""
    p, q = (ops.convert_to_numpy(ops.log_softmax(m.score(ids))) for m in (lm, twin))
    return float(np.mean(np.sum(np.exp(p) * (p - q), axis=-1)))


def calibrated(backbone, calibration):
    """Returns the backbone as a model, quantized to int4."""
    lm = GemmaCausalLM(backbone)
    lm.quantize(QuantizationConfig("int4", 16), calibration=calibration)
    return lm


def test_calibration_brings_products_closer():
    ids = np.random.default_rng(0).integers(3, VOCABULARY_SIZE, (4, 24))
    plain = make_backbone("gemma2_grouped")
    norm = plain.named_weights()["layers.0.pre_attention_norm"]
    uneven = np.where(np.arange(32) % 8, 0.0, 9.0).astype("float32")
    x = {}
    for calibration in (None, ids.tolist()):
        backbone = make_backbone("gemma2_grouped")
        backbone.named_weights()["layers.0.pre_attention_norm"].assign(uneven)
        lm = calibrated(backbone, calibration)
        off = lm.backbone.named_weights()["layers.0.query"].numpy()
        off = off - plain.named_weights()["layers.0.query"].numpy()
        x[calibration is None] = np.sum((off * (1 + uneven)) ** 2)
    assert norm.shape == (32,)
    assert x[False] < 0.8 * x[True]


def test_calibration_takes_texts(tiny_proto):
    lm = make_lm(proto=tiny_proto)
    lm.quantize(QuantizationConfig("int4", 16), calibration=["To be, or not to be", "The slings"])
    assert isinstance(lm.generate("To be", max_new_tokens=4), str)


def test_frozen_weights_stay_frozen_after_loading(tmp_path):
    lm = make_lm()
    lm.quantize("int8")
    lm.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.trainable_variables == [] and again.backbone.quantization.mode == "int8"
    result, expected = (ops.convert_to_numpy(m.score(IDS)) for m in (again, lm))
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_built_in_model_hardly_changes(mode):
    """KL divergence in nats per token, on a text in the style of the training data."""
    text = (
        "DUKE:\nCome hither, gentle sir; what news from Rome?\n\n"
        "Messenger:\nMy lord, the king is dead, and all the town\nIs up in arms against us.\n"
    )
    plain = GemmaCausalLM.from_preset("gemma_tiny_en", dtype="float32")
    lm = GemmaCausalLM.from_preset("gemma_tiny_en", dtype="float32", quantization=mode)
    ids = np.array([lm.preprocessor.tokenizer(text)])
    assert 0 < kl(plain, lm, ids) < (0.001 if mode == "int8" else 0.03)
    config = catalogue.presets()["gemma_tiny_en"].config
    assert report(lm).bytes_after < 1.1 * config.weight_bytes(mode)


def test_summary(pair):
    lines = []
    pair[0].summary(print_fn=lines.append)
    assert "computing in float32; int" in lines[-1]


def test_calibration_errors_name_the_argument():
    for calibration, says in ((5, "`calibration` must be"), ([3], "Ids of `calibration`")):
        with pytest.raises((ValueError, TypeError), match=says):
            make_lm().quantize("int8", calibration=calibration)
    with pytest.raises(ValueError, match=r"`calibration\[1\]` must be in"):
        make_lm().quantize("int8", calibration=[[2, 3], [2, 99999]])


def test_in_mixed_precision():
    """Float32 norms do not change the dtype of activations."""
    config = make_lm().backbone.config.to_dict()
    lm = GemmaCausalLM(GemmaBackbone(**config, dtype="mixed_bfloat16"))
    lm.quantize("int8")
    lm.compile(sampler="greedy", run_eagerly=True)
    assert len(lm.generate(PROMPTS[:1], max_new_tokens=2, stop_token_ids=None)[0]) == 8


class Quantize(keras.callbacks.Callback):
    """Callback that quantizes the model during `fit`."""

    def on_train_batch_end(self, batch, logs=None):
        self.model.quantize("int8")


def test_a_model_that_was_trained(tmp_path):
    lm = make_lm(num_layers=1)
    lm.compile(optimizer="adam", loss="auto", run_eagerly=keras.config.backend() == "torch")
    x = {"token_ids": IDS, "padding_mask": np.ones_like(IDS)}
    with pytest.raises(ValueError, match=r"being trained.*when `fit` has returned"):
        lm.fit(x, IDS, verbose=0, callbacks=[Quantize()])
    alive = weakref.ref(lm.backbone.named_weights()["layers.0.up"].variable)
    lm.quantize("int8")
    gc.collect()
    assert alive() is None and len(lm.optimizer.variables) == 2  # the step, the learning rate
    lm.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert np.isfinite(again.evaluate(x, IDS, verbose=0)).all()

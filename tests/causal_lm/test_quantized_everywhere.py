"""All features on a quantized model, compared with a plain model with the same values."""

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops

from keras_gemma import GemmaBackbone, GemmaCausalLM, samplers, scoring
from keras_gemma.quantization import report
from tests.models import compile_lm, make_lm

SETTINGS = {"int8": {"mode": "int8"}, "int4": {"mode": "int4", "group_size": 16, "zeros": True}}
PROMPT = "To be, or not"
NEW = {"max_new_tokens": 6, "stop_token_ids": None}


@pytest.fixture(scope="module", params=SETTINGS)
def pair(request, tiny_proto):
    """Quantized model with a tokenizer, and its plain twin."""
    lm = make_lm(proto=tiny_proto, num_layers=1)
    lm.quantize(SETTINGS[request.param])
    backbone = GemmaBackbone(**lm.backbone.config.to_dict(), dtype="float32")
    for name, weight in lm.backbone.named_weights().items():
        backbone.named_weights()[name].assign(weight.numpy())
    twin = GemmaCausalLM(backbone, lm.preprocessor)
    compile_lm(twin)
    return lm, twin


def of_both(pair, function):
    return tuple(function(lm) for lm in pair)


class Second(samplers.Sampler):
    """Picks the second most likely token."""

    def choose(self, logits, state):
        return ops.cast(ops.top_k(logits, 2)[1][:, 1], "int32")


class Borrowed(keras_hub.samplers.Sampler):
    """Custom KerasHub sampler."""

    def get_next_token(self, probabilities):
        return ops.argmax(probabilities, axis=-1)


@pytest.mark.parametrize("sampler", [Second, Borrowed])
def test_custom_samplers(pair, sampler):
    result, expected = of_both(pair, lambda lm: lm.generate(PROMPT, sampler=sampler(), **NEW))
    assert result == expected


def test_stream(pair):
    result, expected = of_both(pair, lambda lm: "".join(lm.stream(PROMPT, **NEW)))
    assert result == expected != ""


def test_prefix(pair):
    def run(lm):
        return lm.generate(PROMPT + " to be", prefix=lm.prefill(PROMPT), **NEW)

    result, expected = of_both(pair, run)
    assert result == expected == pair[0].generate(PROMPT + " to be", **NEW)


def test_a_quantized_draft(pair):
    quantized, plain = pair
    expected = plain.generate(PROMPT, **NEW)
    assert plain.generate(PROMPT, draft=quantized, **NEW) == expected
    assert quantized.generate(PROMPT, draft=quantized, **NEW) == expected


def test_scores_and_perplexity(pair):
    hooks = {"block.0.feed_forward.output": lambda x, name: 0 * x}
    result, expected = of_both(
        pair, lambda lm: ops.convert_to_numpy(lm.score(PROMPT, scoring_mode="loss", hooks=hooks))
    )
    np.testing.assert_allclose(result, expected, atol=1e-4)
    result, expected = of_both(pair, lambda lm: lm.perplexity(PROMPT))
    assert result == pytest.approx(expected, rel=1e-4)


def test_looking_inside(pair):
    def traced(lm):
        return ops.convert_to_numpy(scoring.trace(lm, PROMPT, "final_norm")["final_norm"])

    def patched(lm):
        return scoring.activation_patching(lm, "To be, or", "To be; or", 7).scores

    for look in (traced, patched, lambda lm: scoring.logit_lens(lm, PROMPT).probabilities):
        result, expected = of_both(pair, look)
        np.testing.assert_allclose(result, expected, atol=1e-4 * np.abs(expected).max())


def test_attribution(pair):
    result, expected = of_both(pair, lambda lm: scoring.gradient_times_input(lm, PROMPT, 7).scores)
    np.testing.assert_allclose(result, expected, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize("form", ["preset", "keras", "hugging_face"])
def test_saved_and_loaded(pair, form, tmp_path):
    lm, _ = pair
    if form == "preset":
        lm.save_to_preset(tmp_path / "saved")
        again = GemmaCausalLM.from_preset(tmp_path / "saved")
    elif form == "keras":
        lm.save(tmp_path / "saved.keras")
        again = keras.saving.load_model(tmp_path / "saved.keras")
    else:  # holds the dequantized weights
        lm.save_to_hugging_face(tmp_path / "saved")
        again = GemmaCausalLM.from_preset(tmp_path / "saved", dtype="float32")
    compile_lm(again)
    assert (again.backbone.quantization is None) == (form == "hugging_face")
    assert again.generate(PROMPT, **NEW) == lm.generate(PROMPT, **NEW)
    if form != "hugging_face":
        assert report(again).bytes_after == report(lm).bytes_after

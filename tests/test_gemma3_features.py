"""Every feature on a tiny Gemma 3 with eight layers, so that it has two global ones.

The forward pass without a cache is the reference. `tests/parity` compares it with transformers.
"""

import keras
import numpy as np
import pytest

from keras_gemma import QuantizationConfig, samplers
from keras_gemma.causal_lm.model import GemmaCausalLM
from tests.models import compile_lm, logits_of, make_lm

PROMPT = "ROMEO: to be"


@pytest.fixture(scope="module")
def lm(tiny_proto):
    return make_lm("gemma3", tiny_proto, num_layers=8)


@pytest.fixture(scope="module")
def prompt(lm):
    return [2, *lm.preprocessor.tokenizer.encode([PROMPT])[0]]


@pytest.fixture(scope="module")
def answer(lm, prompt):
    """Greedy continuation, from the forward pass without a cache."""
    ids = list(prompt)
    for _ in range(12):
        ids.append(int(logits_of(lm, ids)[-1].argmax()))
    return ids[len(prompt) :]


def generate(lm, prompt, **settings):
    return lm.generate([prompt], max_new_tokens=12, stop_token_ids=None, **settings)[0]


def new_ids(lm, prompt, **settings):
    return list(generate(lm, prompt, **settings)[len(prompt) :])


def test_decoding_beyond_the_window(lm, prompt, answer):
    assert len(prompt) + len(answer) > 2 * lm.backbone.config.sliding_window_size
    assert new_ids(lm, prompt) == answer


@pytest.mark.parametrize(
    "sampler",
    [
        samplers.TopKSampler(k=1),
        samplers.TopPSampler(p=1e-9),
        samplers.MinPSampler(min_p=1.0),
        samplers.RandomSampler(temperature=0.0),
        samplers.BeamSampler(num_beams=1),
        samplers.ContrastiveSampler(k=1),
    ],
    ids=lambda sampler: type(sampler).__name__,
)
def test_samplers_that_are_greedy_in_the_limit(lm, prompt, answer, sampler):
    assert new_ids(lm, prompt, sampler=sampler) == answer


def test_prefix_and_speculation(lm, prompt, answer):
    prefix = lm.prefill(prompt[:5])
    assert new_ids(lm, prompt, prefix=prefix) == answer
    draft = GemmaCausalLM(make_lm("gemma3", num_layers=7).backbone)
    compile_lm(draft)
    assert new_ids(lm, prompt, draft=draft) == answer


def test_streaming_and_chat(lm):
    text = lm.generate(PROMPT, max_new_tokens=8, stop_token_ids=None, strip_prompt=True)
    assert "".join(lm.stream(PROMPT, max_new_tokens=8, stop_token_ids=None)) == text
    chat = lm.chat()
    turns = [{"role": "user", "content": "Hi"}]
    assert chat.send("Hi", max_new_tokens=6) == lm.generate_chat(turns, max_new_tokens=6)


def test_hooks_see_and_change_activations(lm, prompt):
    ids = np.array([prompt])
    seen = {}
    logits = keras.ops.convert_to_numpy(lm.score(ids))
    lm.score(ids, hooks={"block.*.residual.after": lambda x, name: seen.setdefault(name, x)})
    assert len(seen) == 8
    zero = lm.score(ids, hooks={"block.5.attention.output": lambda x, name: 0 * x})
    assert np.abs(keras.ops.convert_to_numpy(zero) - logits).max() > 1e-3


def test_training_with_lora(tiny_proto):
    lm = make_lm("gemma3", tiny_proto, num_layers=8)
    lm.enable_lora(rank=2)
    lm.compile(optimizer=keras.optimizers.Adam(1e-2))
    texts = [PROMPT + " or not to be"]
    losses = lm.fit(texts, batch_size=1, epochs=6, verbose=0).history["loss"]
    assert losses[-1] < losses[0] - 0.1
    before = lm.backbone.named_weights()["layers.5.query_norm"].numpy()
    lm.merge_lora()
    np.testing.assert_array_equal(
        lm.backbone.named_weights()["layers.5.query_norm"].numpy(), before
    )


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_quantized_models_compute_with_their_numbers(mode, lm, tiny_proto, prompt):
    """A quantized model equals a model with its dequantized numbers."""
    quantized = make_lm("gemma3", tiny_proto, num_layers=8)
    quantized.quantize(QuantizationConfig(mode, group_size=16 if mode == "int4" else 32))
    plain = make_lm("gemma3", tiny_proto, num_layers=8)
    weights = plain.backbone.named_weights()
    for name, weight in quantized.backbone.named_weights().items():
        weights[name].assign(weight.numpy())
    expected = logits_of(plain, prompt)
    np.testing.assert_allclose(logits_of(quantized, prompt), expected, atol=1e-3, rtol=1e-3)
    assert np.abs(expected - logits_of(lm, prompt)).max() > 1e-3

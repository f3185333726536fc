"""Results with `keras.config.set_floatx("bfloat16")`, which many notebooks call.

On JAX, Keras then converts integers to floats wherever no dtype is given.
"""

import keras
import numpy as np
import pytest

from tests.models import make_lm

PROMPTS = ["To be, or not", "To die"]
NEW = {"max_new_tokens": 5, "stop_token_ids": None, "seed": 3}


@pytest.fixture
def floatx():
    before, policy = keras.config.floatx(), keras.config.dtype_policy()
    yield keras.config.set_floatx
    keras.config.set_floatx(before)
    keras.config.set_dtype_policy(policy)


def results(lm):
    """Returns texts and scores of every kind of decoding, and losses of training."""
    ids = np.array([[2, 7, 9, 11]], "int32")
    targets = np.roll(ids, -1)
    found = {
        "greedy": lm.generate(PROMPTS, **NEW),
        "beam": lm.generate(PROMPTS, sampler="beam", **NEW),
        "contrastive": lm.generate(PROMPTS, sampler="contrastive", **NEW),
        "draft": lm.generate(PROMPTS[0], draft="prompt", **NEW),
        "penalty": lm.generate(PROMPTS, repetition_penalty=1.5, **NEW),
        "stream": list(lm.stream(PROMPTS[0], **NEW)),
        "logits": np.array(lm.score(ids)),
        "losses": np.array(lm.score(ids, scoring_mode="loss", target_ids=targets)),
    }
    for sampler in ("top_k", "top_p", "min_p", "random"):
        found[sampler] = lm.generate(PROMPTS, sampler=sampler, temperature=0.9, **NEW)
    completion = lm.generate(PROMPTS[0], return_logprobs=2, **NEW)
    found["logprobs"] = np.array(completion.logprobs)
    for mode in ("int8", "int4"):
        quantized = make_lm("gemma2_grouped", lm.preprocessor.tokenizer.proto)
        quantized.quantize(mode, **({"group_size": 16} if mode == "int4" else {}))
        found[mode] = quantized.generate(PROMPTS, **NEW)
    return found


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_results_do_not_depend_on_floatx(name, floatx, tiny_proto):
    expected = results(make_lm("gemma2_grouped", tiny_proto))
    floatx(name)
    lm = make_lm("gemma2_grouped", tiny_proto)
    for key, value in results(lm).items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(value, expected[key], key)
        else:
            assert value == expected[key], key


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_training_lowers_the_loss(name, floatx, tiny_proto):
    floatx(name)
    lm = make_lm("gemma2_grouped", tiny_proto)
    lm.preprocessor.sequence_length = 16
    lm.backbone.enable_lora(4)
    lm.compile(optimizer=keras.optimizers.Adam(0.01))
    losses = lm.fit(PROMPTS, batch_size=2, epochs=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("policy", ["bfloat16", "mixed_bfloat16", "float32"])
def test_dtype_policies_are_those_of_new_models(policy, floatx, tiny_proto):
    keras.config.set_dtype_policy(policy)
    lm = make_lm("gemma2_grouped", tiny_proto, dtype=None)
    assert lm.backbone.dtype_policy.name == policy
    assert lm.generate(PROMPTS[0], **NEW).startswith(PROMPTS[0])
    assert np.isfinite(np.array(lm.score(np.array([[2, 7, 9]], "int32")), "float32")).all()

"""Models that override KerasHub's steps of generation."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_gemma import GemmaCausalLM
from tests.models import compile_lm, make_lm

PROMPTS = ["To be, or not", "To die"]
NEW = {"max_new_tokens": 5}


class Loud(GemmaCausalLM):
    """Never chooses the token of largest logits, by a change of `call_with_cache`."""

    def call_with_cache(self, *args, **kwargs):
        logits, hidden_states, cache = super().call_with_cache(*args, **kwargs)
        return -logits, hidden_states, cache


class Stepwise(GemmaCausalLM):
    """Records the calls of `generate_step`."""

    calls = ()

    def generate_step(self, inputs, stop_token_ids=None):
        self.calls = (*self.calls, tuple(inputs["token_ids"].shape))
        return super().generate_step(inputs, stop_token_ids)


@pytest.fixture(scope="module")
def lm(tiny_proto):
    return make_lm(proto=tiny_proto)


def derived(cls, lm):
    model = cls(lm.backbone, lm.preprocessor)
    compile_lm(model)
    return model


def scores(lm, ids):
    return ops.convert_to_numpy(lm.score(ids))


def test_overridden_cache_function_decides_the_tokens(lm):
    loud = derived(Loud, lm)
    ids = lm.preprocessor.tokenize_prompts(PROMPTS[:1])[0].tolist()
    expected = list(ids)
    for _ in range(NEW["max_new_tokens"]):
        logits = scores(lm, np.array([expected], "int32"))[0, -1]
        expected.append(int(logits.argmin()))
    result = loud.generate([ids], stop_token_ids=None, **NEW)
    assert result == [expected]
    assert loud.generate(PROMPTS, **NEW)[0] == loud.generate(PROMPTS[0], **NEW)


def test_overridden_step_is_called(lm):
    stepwise = derived(Stepwise, lm)
    assert stepwise.generate(PROMPTS, **NEW) == lm.generate(PROMPTS, **NEW)
    longest = max(map(len, lm.preprocessor.tokenize_prompts(PROMPTS)))
    assert stepwise.calls == ((2, longest + 5),)
    text = stepwise.generate(PROMPTS[1], strip_prompt=True, **NEW)
    assert text == lm.generate(PROMPTS[1], strip_prompt=True, **NEW)


def test_settings_that_a_step_does_not_know_are_refused(lm):
    loud = derived(Loud, lm)
    with pytest.raises(ValueError, match=r"its own sampler and no other settings.*seed=3"):
        loud.generate(PROMPTS, seed=3, **NEW)
    with pytest.raises(ValueError, match="does not support `stop`"):
        loud.generate(PROMPTS, stop="x", **NEW)


def test_generate_function_as_in_keras_hub(lm):
    model = derived(GemmaCausalLM, lm)
    assert model.generate_function is None
    model.generate(PROMPTS[0], **NEW)
    first = model.generate_function
    model.generate(PROMPTS[0], **NEW)
    assert model.generate_function == first == model.generate_step
    compile_lm(model)
    assert model.generate_function is None
    assert not GemmaCausalLM(lm.backbone, compile=False).compiled


def test_new_cache_equals_hidden_states(lm):
    ids = np.array([[2, 7, 9, 11]], "int32")
    hidden_states, cache = lm.build_cache(ids)
    expected = lm.backbone({"token_ids": ids, "padding_mask": ops.ones(ids.shape)})
    np.testing.assert_allclose(
        ops.convert_to_numpy(hidden_states), ops.convert_to_numpy(expected), atol=1e-5
    )
    assert cache.shape[1:4] == (lm.backbone.config.num_layers, 2, 4)


def test_quantization_layer_structure(lm):
    structure = lm.get_quantization_layer_structure("gptq")
    assert structure["sequential_blocks"] == lm.backbone.transformer_layers
    (embedding,) = structure["pre_block_layers"]
    assert isinstance(embedding, keras.Model)
    assert lm.get_quantization_layer_structure("int8") is None


def test_dict_of_tensors_arrays_and_lists(lm):
    ids = [[2, 7, 9, 11]]
    expected = lm({"token_ids": np.array(ids), "padding_mask": np.ones((1, 4))})
    mixed = lm({"token_ids": ids, "padding_mask": ops.ones((1, 4), dtype="bool")})
    np.testing.assert_array_equal(ops.convert_to_numpy(mixed), ops.convert_to_numpy(expected))


def test_weights_with_an_adapter_load_without_it(lm, tmp_path):
    tuned = make_lm(proto=lm.preprocessor.tokenizer.proto)
    tuned.enable_lora(4, alpha=8)
    for variable in tuned.trainable_variables:
        noise = np.random.default_rng(len(variable.path)).normal(size=variable.shape)
        variable.assign(0.05 * noise)
    path = tmp_path / "tuned.weights.h5"
    tuned.save_weights(path)
    plain = make_lm(proto=lm.preprocessor.tokenizer.proto)
    plain.load_weights(path)
    ids = np.array([[2, 7, 9, 11]], "int32")
    merged, expected, base = (scores(model, ids) for model in (plain, tuned, lm))
    np.testing.assert_allclose(merged, expected, atol=1e-4)
    assert np.abs(expected - base).max() > 0.01
    tuned.set_adapter(None)
    tuned.save_weights(path)
    plain.load_weights(path)
    np.testing.assert_allclose(scores(plain, ids), base, atol=1e-5)


def test_streams_do_not_ignore_overridden_steps(lm):
    loud = derived(Loud, lm)
    with pytest.raises(ValueError, match="call `generate` instead of `stream`"):
        loud.stream(PROMPTS[0], **NEW)

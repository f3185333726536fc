"""Models converted to KerasHub's and back: the same weights, outputs and texts."""

import sys
import warnings

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops

import keras_gemma
from keras_gemma import from_keras_hub, samplers, to_keras_hub
from keras_gemma.causal_lm.model import GemmaCausalLM
from keras_gemma.config import GemmaConfig
from keras_gemma.interop.keras_hub_samplers import _SAMPLERS
from keras_gemma.model.backbone import GemmaBackbone
from keras_gemma.text.preprocessor import GemmaCausalLMPreprocessor
from keras_gemma.text.tokenizer import GemmaTokenizer
from tests.configurations import CONFIGURATIONS, GEMMA1, GEMMA2, GEMMA3
from tests.storage.conftest import (
    IDS,
    assert_close,
    assert_same_weights,
    make_backbone,
    make_keras_hub_backbone,
    outputs,
)
from tests.storage.keras_hub_weights import (
    KERAS_HUB_IS_WRONG,
    assert_same_as_keras_hub,
    leaves_a_file_open,
)

WRONG = {
    "gemma2_27b_scale": r"`query_head_dim_normalize=False`.*1/sqrt\(8\)",
    "gemma2_epsilon": r"`layer_norm_epsilon=0\.1` is used only by the last norm",
    "gemma3_27b_scale": r"`query_head_dim_normalize=False`.*1/sqrt\(8\)",
}
RIGHT = [name for name in CONFIGURATIONS if name not in WRONG]


def make_lm(configuration=GEMMA2, proto=None, dtype="float32", sampler="greedy"):
    preprocessor = None
    if proto is not None:
        preprocessor = GemmaCausalLMPreprocessor(
            GemmaTokenizer(proto), sequence_length=20, add_end_token=False
        )
    lm = GemmaCausalLM(make_backbone(configuration, dtype), preprocessor)
    lm.compile(sampler=sampler)
    return lm


def make_keras_hub_lm(configuration=GEMMA2, **arguments):
    return keras_hub.models.GemmaCausalLM(make_keras_hub_backbone(configuration), **arguments)


def places(warned):
    """Returns the files that warnings point to, without warnings of Keras about NumPy."""
    return [warning.filename for warning in warned if warning.category is UserWarning]


@pytest.mark.parametrize("name", RIGHT)
def test_to_keras_hub(name):
    ours = make_backbone(CONFIGURATIONS[name])
    theirs = to_keras_hub(ours)  # without a warning, which would be an error
    assert type(theirs).__name__ == f"{ours.config.family}Backbone"
    assert theirs.name == ours.name
    assert ours.config.to_keras_hub().items() <= theirs.get_config().items()
    assert_same_as_keras_hub(ours, theirs)
    assert_close(outputs(ours), outputs(theirs))
    back = from_keras_hub(theirs)
    assert back.config == ours.config
    assert_same_weights(back, ours)


@pytest.mark.parametrize("configuration", [GEMMA1, GEMMA2, GEMMA3])
def test_from_keras_hub(configuration):
    theirs = make_keras_hub_backbone(configuration)
    ours = from_keras_hub(theirs)
    assert type(ours).__name__ == type(theirs).__name__
    assert ours.config == GemmaConfig(**configuration)
    assert_same_as_keras_hub(ours, theirs)
    assert_close(outputs(ours), outputs(theirs))


def test_warns_if_keras_hub_computes_differently():
    assert set(WRONG) == set(KERAS_HUB_IS_WRONG)
    for name, text in WRONG.items():
        ours = make_backbone(CONFIGURATIONS[name])
        with pytest.warns(UserWarning, match=text) as warned:
            theirs = to_keras_hub(ours)
        assert places(warned) == [__file__]
        assert_same_as_keras_hub(ours, theirs)
        back = from_keras_hub(theirs)
        assert back.config == ours.config
        assert_same_weights(back, ours)
        assert_close(outputs(back), outputs(ours))
    both = CONFIGURATIONS["gemma2_27b_scale"] | {"layer_norm_epsilon": 0.1}
    lm = GemmaCausalLM(make_backbone(both))
    with pytest.warns(UserWarning, match="query_head_dim_normalize.*layer_norm_eps") as warned:
        to_keras_hub(lm)
    assert places(warned) == [__file__]


def test_unused_scale_causes_no_warning():
    # D / N is H: both scales are the same.
    ours = make_backbone(GEMMA1 | {"query_head_dim_normalize": False})
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        theirs = to_keras_hub(ours)
    assert places(warned) == []
    assert_close(outputs(ours), outputs(theirs))


def test_context_length_is_not_converted():
    ours = make_backbone(GEMMA1 | {"context_length": 16})
    theirs = to_keras_hub(ours)
    assert "context_length" not in theirs.get_config()
    assert from_keras_hub(theirs).config.context_length == 8192


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed_bfloat16"])
def test_dtype_policies(dtype):
    ours = make_backbone(GEMMA2, dtype)
    theirs = to_keras_hub(ours)
    assert theirs.dtype_policy.name == dtype
    assert {str(w.dtype) for w in theirs.weights} == {ours.token_embedding.embeddings.dtype}
    assert theirs.token_embedding.compute_dtype == "bfloat16"
    back = from_keras_hub(theirs)
    assert back.dtype_policy.name == dtype
    assert_same_weights(back, ours)
    # The policy of Keras at the time, where KerasHub was given none.
    keras.config.set_dtype_policy(dtype)
    theirs = keras_hub.models.GemmaBackbone(**GEMMA1)
    keras.config.set_dtype_policy("float32")
    assert from_keras_hub(theirs).dtype_policy.name == dtype


def test_models_share_no_memory():
    ours = make_backbone(GEMMA1)
    before = {name: np.array(w.numpy()) for name, w in ours.named_weights().items()}
    theirs = to_keras_hub(ours)
    back = from_keras_hub(theirs)
    for variable in theirs.weights:
        variable.assign(variable + 1)
    for backbone in (ours, back):
        for name, weight in backbone.named_weights().items():
            np.testing.assert_array_equal(weight.numpy(), before[name])


def test_weights_are_not_initialized_at_random(monkeypatch):
    ours = make_backbone(GEMMA1)
    drawn = []
    for initializer in (keras.initializers.RandomNormal, keras.initializers.VarianceScaling):

        def note(self, *args, draw=initializer.__call__, **kwargs):
            drawn.append(type(self))
            return draw(self, *args, **kwargs)

        monkeypatch.setattr(initializer, "__call__", note)
    assert_same_weights(from_keras_hub(to_keras_hub(ours)), ours)
    assert drawn == []
    for make in (GemmaBackbone, keras_hub.models.GemmaBackbone):
        make(**GEMMA1)
        assert drawn  # so this is what they draw with
        drawn.clear()


def test_frozen_models_stay_frozen():
    ours = make_backbone(GEMMA1)
    ours.trainable = False
    theirs = to_keras_hub(ours)
    assert theirs.trainable is False
    assert from_keras_hub(theirs).trainable is False


@leaves_a_file_open
def test_built_in_model_generates_the_same_text():
    ours = GemmaCausalLM.from_preset("gemma_tiny_en", dtype="float32")
    theirs = to_keras_hub(ours)
    assert_same_weights(from_keras_hub(theirs).backbone, ours.backbone)
    ours.run_eagerly = keras.config.backend() == "torch"
    theirs.run_eagerly = keras.config.backend() != "jax"
    texts = [lm.generate("ROMEO:", max_length=20, stop_token_ids=[1]) for lm in (ours, theirs)]
    assert texts[0] == texts[1] != "ROMEO:"


def test_task_round_trip(tiny_proto):
    ours = make_lm(proto=tiny_proto)
    theirs = to_keras_hub(ours)
    assert type(theirs) is keras_hub.models.GemmaCausalLM
    x = {"token_ids": IDS, "padding_mask": np.ones_like(IDS)}
    assert_close([ops.convert_to_numpy(ours(x))], [ops.convert_to_numpy(theirs(x))])
    settings = {"sequence_length": 20, "add_start_token": True, "add_end_token": False}
    for lm in (theirs, from_keras_hub(theirs)):
        assert {name: getattr(lm.preprocessor, name) for name in settings} == settings
        assert lm.preprocessor.tokenizer.proto == tiny_proto
        assert lm.name == ours.name
    text = "To be, or not to be"
    for got, expected in zip(
        keras.tree.flatten(theirs.preprocessor(text)),
        keras.tree.flatten(ours.preprocessor(text)),
        strict=True,
    ):
        np.testing.assert_array_equal(ops.convert_to_numpy(got), expected)


def test_without_a_preprocessor():
    theirs = to_keras_hub(make_lm())
    assert theirs.preprocessor is None
    assert from_keras_hub(theirs).preprocessor is None


def test_parts_without_task(tiny_proto):
    tokenizer = GemmaTokenizer(tiny_proto, add_bos=True, sequence_length=9, dtype="int64")
    theirs = to_keras_hub(tokenizer)
    assert type(theirs) is keras_hub.models.GemmaTokenizer
    assert (theirs.add_bos, theirs.add_eos, theirs.sequence_length) == (True, False, 9)
    assert theirs.compute_dtype == "int64"
    assert from_keras_hub(theirs).get_config() == tokenizer.get_config()
    preprocessor = GemmaCausalLMPreprocessor(tokenizer, sequence_length=7, add_start_token=False)
    theirs = to_keras_hub(preprocessor)
    assert type(theirs) is keras_hub.models.GemmaCausalLMPreprocessor
    assert (theirs.sequence_length, theirs.add_start_token) == (7, False)
    assert from_keras_hub(theirs).get_config() == preprocessor.get_config()


@pytest.mark.parametrize(
    "sampler",
    [
        samplers.GreedySampler(),
        samplers.RandomSampler(seed=3, temperature=0.5),
        samplers.TopKSampler(k=7, seed=3, temperature=0.5),
        samplers.TopPSampler(p=0.3, k=9, seed=3, temperature=2.0),
        samplers.BeamSampler(3, True, temperature=0.5),
        samplers.ContrastiveSampler(3, 0.4),
    ],
    ids=repr,
)
def test_samplers(sampler):
    theirs = to_keras_hub(make_lm(GEMMA1, sampler=sampler))
    assert type(theirs.sampler) is getattr(keras_hub.samplers, type(sampler).__name__)
    shared = sampler.get_config().keys() & theirs.sampler.get_config().keys()
    assert shared >= set(_SAMPLERS[type(sampler).__name__])
    assert all(theirs.sampler.get_config()[name] == getattr(sampler, name) for name in shared)
    assert from_keras_hub(theirs).sampler == sampler


class Own(keras_hub.samplers.Sampler):
    def get_next_token(self, probabilities):
        return ops.argmin(probabilities, axis=-1)


class OwnOfOurs(samplers.Sampler):
    def get_next_token(self, probabilities):
        return ops.argmin(probabilities, axis=-1)


def test_samplers_of_one_library():
    own = Own()
    lm = make_keras_hub_lm(GEMMA1)
    lm.compile(sampler=own)
    ours = from_keras_hub(lm)
    assert ours.sampler.lender is own
    assert to_keras_hub(ours).sampler is own

    with pytest.warns(UserWarning, match="no `length_penalty`"):
        theirs = to_keras_hub(make_lm(GEMMA1, sampler=samplers.BeamSampler(length_penalty=1)))
    assert from_keras_hub(theirs).sampler == samplers.BeamSampler()

    for sampler in (OwnOfOurs(), OwnOfOurs(temperature=0)):
        with pytest.warns(UserWarning, match="greedily.*no sampler OwnOfOurs") as warned:
            theirs = to_keras_hub(make_lm(GEMMA1, sampler=sampler))
        assert type(theirs.sampler) is keras_hub.samplers.GreedySampler
        assert places(warned) == [__file__]

    # KerasHub divides by the temperature.
    theirs = to_keras_hub(make_lm(GEMMA1, sampler=samplers.RandomSampler(temperature=0)))
    assert type(theirs.sampler) is keras_hub.samplers.GreedySampler


class OwnBackbone(keras_hub.models.GemmaBackbone):
    """Custom subclass."""


def test_subclasses():
    theirs = OwnBackbone(**GEMMA1)
    assert_same_as_keras_hub(from_keras_hub(theirs), theirs)

    class OwnLM(GemmaCausalLM):
        pass

    assert type(to_keras_hub(OwnLM(make_backbone(GEMMA1)))) is keras_hub.models.GemmaCausalLM


def test_models_with_lora_are_refused(tmp_path):
    theirs = make_keras_hub_backbone(GEMMA1)
    theirs.enable_lora(2)
    for layer in theirs.transformer_layers:
        for dense in (layer.attention.query_dense, layer.attention.value_dense):
            dense.lora_kernel_b.assign(np.full(dense.lora_kernel_b.shape, 0.1))
    for item in (theirs, keras_hub.models.GemmaCausalLM(theirs)):
        with pytest.raises(ValueError, match=r"LoRA.*`save_to_preset\(folder\)`.*from_preset"):
            from_keras_hub(item)
    theirs.save_to_preset(str(tmp_path / "merged"))
    ours = GemmaBackbone.from_preset(tmp_path / "merged")
    assert_close(outputs(ours), outputs(theirs))


@pytest.mark.filterwarnings("ignore")  # Keras lists layers that it does not quantize
@pytest.mark.parametrize("mode", ["int8", "int4", "float8"])
def test_quantized_models_are_refused(mode):
    theirs = make_keras_hub_backbone(GEMMA1 | {"num_layers": 1})
    theirs.quantize(mode)
    with pytest.raises(ValueError, match=f"quantized.*without `quantize`.* in {mode}"):
        from_keras_hub(theirs)


def test_layers_of_several_dtypes_are_refused():
    policy = keras.dtype_policies.DTypePolicyMap(default_policy="float32")
    policy["decoder_block_1/ffw_linear"] = keras.DTypePolicy("bfloat16")
    theirs = keras_hub.models.GemmaBackbone(**GEMMA1, dtype=policy)
    with pytest.raises(ValueError, match=r"one dtype policy.*bfloat16.*float32"):
        from_keras_hub(theirs)


def make_llama():
    return keras_hub.models.LlamaBackbone(
        vocabulary_size=32,
        num_layers=1,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=8,
        intermediate_dim=16,
    )


def test_other_objects_are_refused(tiny_proto):
    ours, llama = make_backbone(GEMMA1), make_llama()
    for item in (llama, ours, None, "gemma_2b_en"):
        with pytest.raises(
            TypeError, match=r"of keras_hub\.models\. Received: .*(Llama|Gem|None|str)"
        ):
            from_keras_hub(item)
    theirs = make_keras_hub_backbone(GEMMA1)
    plain = keras_gemma.GemmaPreprocessor(GemmaTokenizer(tiny_proto))
    for item in (theirs, llama, plain, None):
        with pytest.raises(TypeError, match=r"of keras_gemma\. Received: "):
            to_keras_hub(item)
    lm = keras_hub.models.GemmaCausalLM(theirs, preprocessor=keras.layers.Identity())
    with pytest.raises(TypeError, match=r"`preprocessor` must be.*Identity"):
        from_keras_hub(lm)


def test_without_keras_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "keras_hub", None)
    for convert in (to_keras_hub, from_keras_hub):
        with pytest.raises(ImportError, match=r'pip install "\.\[hub\]"'):
            convert(None)


def test_blocks_cannot_be_replaced():
    backbone = GemmaBackbone(**GEMMA1)
    with pytest.raises(AttributeError, match=r"cannot be replaced.*pass hooks"):
        backbone.transformer_layers = []

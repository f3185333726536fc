"""GemmaConfig: derived sizes and invalid arguments."""

import dataclasses

import pytest

from keras_gemma.config import GemmaConfig
from tests.configurations import CONFIGURATIONS, GEMMA1, GEMMA2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            ({name: value}, rf"`{name}` must be a positive integer. Received: {name}={value!r}")
            for name in (
                "vocabulary_size",
                "num_layers",
                "num_query_heads",
                "num_key_value_heads",
                "hidden_dim",
                "intermediate_dim",
                "head_dim",
                "sliding_window_size",
                "context_length",
            )
            for value in (0, -1, 2.0, True, None)
        ),
        ({"num_key_value_heads": 3}, "multiple of `num_key_value_heads`.*=4.*=3"),
        ({"intermediate_dim": 97}, "even. Received: intermediate_dim=97"),
        ({"head_dim": 7}, "even.*Received: head_dim=7"),
        (
            {"attention_logit_soft_cap": 0.0},
            "greater than 0. `None`.*soft_cap=0.0",
        ),
        ({"attention_logit_soft_cap": -1}, "greater than 0. `None`.*attention_logit_soft_cap=-1"),
        (
            {"final_logit_soft_cap": float("nan")},
            "greater than 0. `None`.*final_logit_soft_cap=n",
        ),
        ({"layer_norm_epsilon": 0.0}, "greater than 0.*layer_norm_epsilon=0.0"),
        ({"dropout": -0.1}, r"in \[0, 1\). Received: dropout=-0.1"),
        ({"dropout": 1.0}, r"in \[0, 1\). Received: dropout=1.0"),
    ],
)
def test_invalid_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        GemmaConfig(**GEMMA2 | change)


def test_is_frozen():
    config = GemmaConfig(**GEMMA1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_dim = 64


def test_local_layers_are_the_even_ones():
    config = GemmaConfig(**GEMMA2)
    assert [config.is_local(layer) for layer in range(4)] == [True, False, True, False]
    assert [config.layer_kind(layer).window for layer in range(4)] == [4, None, 4, None]
    assert not any(GemmaConfig(**GEMMA1).is_local(layer) for layer in range(2))


def test_derived_sizes():
    config = GemmaConfig(**GEMMA1)
    assert config.feed_forward_dim == 48
    assert config.query_scale == pytest.approx(8**-0.5)
    assert config.embedding_scale == pytest.approx(32**0.5)
    assert config.context_length == 8192
    other = GemmaConfig(**CONFIGURATIONS["gemma2_27b_scale"])
    assert other.query_scale == pytest.approx((48 / 4) ** -0.5)


def test_weights():
    config = GemmaConfig(**GEMMA1)
    names = list(config.weight_shapes())
    assert names[0] == "token_embedding" and names[-1] == "final_norm"
    assert not any("post" in name for name in names)
    matrices = 4 * 32 * 32 + 3 * 32 * 48
    assert config.parameter_count == 512 * 32 + 2 * (matrices + 2 * 32) + 32
    assert config.weight_bytes("float32") == 4 * config.parameter_count
    assert config.weight_bytes() == 2 * config.parameter_count
    assert len(GemmaConfig(**GEMMA2).weight_shapes()) == 2 + 4 * 11


def test_cache_bytes():
    config = GemmaConfig(**GEMMA2)
    # Two local layers of 4 slots, two of all 10; keys and values of 2 heads of 8 numbers.
    assert [config.cache_slots(layer, 10) for layer in range(4)] == [4, 10, 4, 10]
    assert config.cache_bytes(3, 10) == 3 * (4 + 10 + 4 + 10) * 2 * 2 * 8 * 2
    assert config.cache_bytes(3, 10, "float32") == 2 * config.cache_bytes(3, 10)
    assert config.cache_bytes(1, 2) == 4 * 2 * 2 * 2 * 8 * 2


@pytest.mark.parametrize("variant", CONFIGURATIONS)
def test_dictionary(variant):
    config = GemmaConfig(**CONFIGURATIONS[variant])
    values = config.to_dict()
    assert CONFIGURATIONS[variant].items() <= values.items()
    assert GemmaConfig.from_dict(values | {"name": "gemma", "trainable": True}) == config
    theirs = config.to_keras_hub()
    assert "context_length" not in theirs
    again = GemmaConfig.from_keras_hub(config.family, theirs)
    assert again.to_dict() == values

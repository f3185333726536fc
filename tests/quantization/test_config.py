"""Quantization settings: validation and conversion."""

import dataclasses
import json

import pytest

from keras_gemma import GemmaConfig, QuantizationConfig
from keras_gemma.quantization import join, to_config
from tests.configurations import GEMMA2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"mode": "int2"},
            "`mode` must be one of 'int8', 'int4', 'as_stored'. Received: mode='int2'",
        ),
        ({"mode": "int4", "group_size": 0}, "group_size=0"),
        ({"mode": "int4", "group_size": True}, "group_size=True"),
        ({"mode": "int4", "zero_points": 1}, "zero_points=1"),
        ({"mode": "int4", "zeros": 1}, "zero_points=1"),
        ({"mode": "int4", "embedding": "bfloat16"}, "embedding='bfloat16'"),
        ({"mode": "int8", "embedding": "int4"}, "require mode='int4'"),
        ({"mode": "int8", "zero_points": True}, "require mode='int4'"),
    ],
)
def test_invalid_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuantizationConfig(**arguments)


def test_to_and_from_a_dictionary():
    config = QuantizationConfig("int4", 16, zero_points=True, embedding="int4")
    assert to_config(json.loads(json.dumps(config.to_dict()))) == config
    assert to_config("int8") == QuantizationConfig("int8")
    assert to_config(None) is None and to_config(config) is config
    with pytest.raises(ValueError, match=r"requires `mode` and accepts.*group_size.*bits"):
        to_config({"mode": "int4", "bits": 4})
    with pytest.raises(
        TypeError, match=r"`quantization` must be 'int8' or 'int4' or 'as_stored'.*Received: 8"
    ):
        to_config(8)
    with pytest.raises(ValueError, match=r"`quantization` must be one of 'int8', .*'int3'"):
        to_config("int3")


def test_types_of_weights_as_stored():
    types = {"token_embedding": "Q8_0", "layers.1.query": "Q4_K", "layers.10.query": "Q5_0"}
    config = QuantizationConfig("as_stored", types=types)
    assert to_config(json.loads(json.dumps(config.to_dict()))) == config
    block = config.within("layers.1")
    assert block.types == {"query": "Q4_K"} and config.within("layers.2") is None
    assert block.within("query").layout("matrix").bits == 4 and block.within("key") is None
    names = ("token_embedding", "layers.0", "layers.1", "layers.10", "final_norm")
    assert join({name: config.within(name) for name in names}) == config
    assert join({"query": block.within("query"), "key": None}) == block
    int8 = QuantizationConfig("int8")
    assert int8.within("layers.0") is int8 and join({"a": int8, "b": int8}) is int8
    assert join({"a": None}) is None
    assert hash(config) == hash(QuantizationConfig("as_stored", types=types))


def test_zeros_is_an_alias_of_zero_points():
    config = QuantizationConfig("int4", zeros=True)
    assert config == QuantizationConfig("int4", zero_points=True)
    assert config.zeros and config.zero_points
    assert not dataclasses.replace(config, zero_points=False).zero_points
    assert not dataclasses.replace(config, zeros=False).zero_points
    assert config.to_dict() == {
        "mode": "int4",
        "group_size": 32,
        "zeros": True,
        "embedding": "int8",
    }
    for name in ("zeros", "zero_points"):
        assert to_config({"mode": "int4", name: True}) == config


def test_groups_must_fill_rows():
    shapes = GemmaConfig(**GEMMA2).weight_shapes()
    with pytest.raises(ValueError, match=r"group_size=32, and rows of 48 \(layers.0.down\)"):
        QuantizationConfig("int4").check_shapes(shapes)
    with pytest.raises(ValueError, match=r"rows of 32 \(token_embedding\), 48 \(layers.0.down\)"):
        QuantizationConfig("int4", 20, embedding="int4").check_shapes(shapes)
    QuantizationConfig("int4", 16, embedding="int4").check_shapes(shapes)
    QuantizationConfig("int8", 7).check_shapes(shapes)

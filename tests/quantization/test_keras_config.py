"""Quantization configs of Keras."""

import keras
import numpy as np
import pytest

from keras_gemma import QuantizationConfig
from tests.models import make_lm

TEXTS = ["To be, or not to be, that is the question", "The slings and arrows of fortune"]


@pytest.fixture
def lm(tiny_proto):
    return make_lm(proto=tiny_proto, num_layers=1)


def scores(lm):
    return np.array(keras.ops.convert_to_numpy(lm.score(np.array([[2, 7, 9, 11]], "int32"))))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (keras.quantizers.Int8QuantizationConfig(), QuantizationConfig("int8")),
        (
            keras.quantizers.Int4QuantizationConfig(block_size=16),
            QuantizationConfig("int4", 16, True),
        ),
    ],
)
def test_config_means_the_same_as_ours(lm, tiny_proto, config, expected):
    lm.quantize(config=config)
    assert lm.backbone.quantization == expected
    other = make_lm(proto=tiny_proto, num_layers=1)
    other.quantize(expected)
    np.testing.assert_array_equal(scores(lm), scores(other))


@pytest.mark.parametrize("name", ["GPTQConfig", "AWQConfig"])
def test_data_sets_calibrate(lm, tiny_proto, name):
    config = getattr(keras.quantizers, name)(
        dataset=(text for text in TEXTS * 9), tokenizer=None, num_samples=2, group_size=16
    )
    with pytest.warns(UserWarning, match=f"{name} is replaced by int4 with calibration"):
        lm.quantize(config.mode, config=config)
    other = make_lm(proto=tiny_proto, num_layers=1)
    other.quantize("int4", 16, zero_points=True, calibration=TEXTS)
    np.testing.assert_array_equal(scores(lm), scores(other))


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"config": QuantizationConfig("int8")}, TypeError, "pass it as `mode`"),
        (
            {"mode": "int4", "config": keras.quantizers.Int8QuantizationConfig()},
            ValueError,
            "must be that of `config`, 'int8'",
        ),
        ({"config": keras.quantizers.Int4QuantizationConfig(block_size=-1)}, ValueError, "a scale"),
        (
            {"config": keras.quantizers.Int8QuantizationConfig(keras.quantizers.AbsMaxQuantizer())},
            ValueError,
            "must not have a `weight_quantizer`",
        ),
        (
            {"config": keras.quantizers.GPTQConfig(TEXTS, None, weight_bits=3)},
            ValueError,
            "weight_bits=4",
        ),
        ({"config": keras.quantizers.Float8QuantizationConfig()}, ValueError, "must be an Int8"),
    ],
)
def test_configs_without_a_counterpart_are_refused(lm, arguments, error, says):
    with pytest.raises(error, match=says):
        lm.quantize(**arguments)
    assert lm.backbone.quantization is None

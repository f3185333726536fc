"""Published models, without memory for weights."""

import numpy as np
import pytest

from keras_gemma.backend import uninitialized
from keras_gemma.config import GemmaConfig
from keras_gemma.model.backbone import GemmaBackbone
from tests.model.sizes import PUBLISHED


@pytest.mark.parametrize("name", PUBLISHED)
def test_config(name):
    configuration, parameters = PUBLISHED[name]
    config = GemmaConfig(**configuration)
    assert config.parameter_count == parameters
    assert config.weight_bytes("bfloat16") == 2 * parameters


@pytest.mark.parametrize("name", PUBLISHED)
def test_backbone(name):
    configuration, parameters = PUBLISHED[name]
    with uninitialized():  # with a bare StatelessScope, Keras would allocate all weights later
        backbone = GemmaBackbone(**configuration, dtype="bfloat16")
    assert backbone.count_params() == parameters
    assert backbone.context_length == configuration.get("context_length", 8192)
    weights = backbone.named_weights()
    assert all(weight.variable._value is None for weight in weights.values())
    assert {name: weight.shape for name, weight in weights.items()} == (
        backbone.config.weight_shapes()
    )
    # A packed weight has as many numbers in any layout.
    for weight in weights.values():
        assert np.prod(weight.variable.shape) == np.prod(weight.shape)


def test_query_scale_of_27b():
    config = GemmaConfig(**PUBLISHED["gemma2_27b"][0])
    assert config.query_scale == pytest.approx(144**-0.5)
    assert GemmaConfig(**PUBLISHED["gemma2_9b"][0]).query_scale == pytest.approx(256**-0.5)

"""The published models by shape alone: nothing is allocated."""

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
    with uninitialized():  # a bare StatelessScope would have Keras allocate it all later
        backbone = GemmaBackbone(**configuration, dtype="bfloat16")
    assert backbone.count_params() == parameters
    assert backbone.context_length == (1024 if name.startswith("vault") else 8192)
    weights = backbone.named_weights()
    assert all(weight.variable._value is None for weight in weights.values())
    assert {name: weight.shape for name, weight in weights.items()} == (
        backbone.config.weight_shapes()
    )
    # Whatever layout the backend packs a weight in, it holds the same numbers.
    for weight in weights.values():
        assert np.prod(weight.variable.shape) == np.prod(weight.shape)


def test_scale_of_27b_queries_is_not_that_of_its_heads():
    config = GemmaConfig(**PUBLISHED["gemma2_27b"][0])
    assert config.query_scale == pytest.approx(144**-0.5)
    assert GemmaConfig(**PUBLISHED["gemma2_9b"][0]).query_scale == pytest.approx(256**-0.5)

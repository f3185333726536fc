"""Bytes and operations, compared with the counts of Keras and with sums written by hand."""

import keras
import pytest

from keras_gemma.benchmark.arithmetic import bandwidth_utilization, decode_bytes, prefill_flops
from keras_gemma.benchmark.random_model import random_model
from keras_gemma.config import GemmaConfig
from tests.configurations import CONFIGURATIONS, GEMMA2


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_prefill_counts_each_matrix_once_per_token(name):
    config = GemmaConfig(**CONFIGURATIONS[name])
    backbone = random_model(config, "float32").backbone
    embedding = config.vocabulary_size * config.hidden_dim
    norms = sum(w.shape[0] for w in backbone.weights if len(w.shape) == 1)
    matrices = backbone.count_params() - embedding - norms
    assert prefill_flops(config, batch=3, prompt=5) == 2 * 3 * (5 * matrices + embedding)


def test_decode_reads_weights_and_the_filled_cache():
    """Two layers have a window of 4, two are global; 2 key/value heads of 8, in 2 bytes."""
    config = GemmaConfig(**GEMMA2)
    token = 2 * 2 * 8 * 2
    # Prompt 3, new 4: the decode steps read texts of 4, 5 and 6 tokens.
    whole = 2 * (4 + 5 + 6) * token
    local = 2 * (4 + 4 + 4) * token
    read = decode_bytes(config, 1000, batch=1, prompt=3, new=4, cache_dtype="bfloat16")
    assert read == 1000 + (whole + local) / 3
    rows = decode_bytes(config, 1000, batch=5, prompt=3, new=4, cache_dtype="float32")
    assert rows == 1000 + 5 * 2 * (whole + local) / 3


def test_published_shape():
    """Gemma 2 2B in bfloat16: 26 layers of 4 heads of 256, so 106,496 bytes per token."""
    from keras_gemma.catalogue import presets

    config = presets()["gemma2_2b_en"].config
    read = decode_bytes(config, config.weight_bytes(), batch=1, prompt=32, new=32)
    assert read == 2 * 2_614_341_888 + 48 * 106_496


def test_utilization():
    assert bandwidth_utilization(20.0, 2e9, 50e9) == pytest.approx(0.8)


def test_random_model_is_the_same_each_time():
    config = GemmaConfig(**GEMMA2)
    first, second = (random_model(config, "float32").backbone.named_weights() for _ in range(2))
    for name, weight in first.items():
        values = keras.ops.convert_to_numpy(weight.numpy())
        assert (values == second[name].numpy()).all()
        assert values.std() == pytest.approx(weight.shape[-1] ** -0.5, rel=0.5)

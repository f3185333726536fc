"""Training changes every weight; dropout is active only in training."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_gemma.model.backbone import GemmaBackbone
from tests.configurations import CONFIGURATIONS, GEMMA1

IDS = np.array([[2, 7, 9, 30, 4, 8], [2, 5, 5, 1, 0, 0]])
INPUTS = {"token_ids": IDS, "padding_mask": (IDS > 0).astype("int32")}


@pytest.mark.parametrize(
    ("variant", "policy"),
    [("gemma1_multi_query", "float32"), ("gemma2_27b_scale", "mixed_bfloat16")],
)
def test_step_changes_every_weight(variant, policy):
    backbone = GemmaBackbone(**CONFIGURATIONS[variant], dtype=policy)
    logits = backbone.token_embedding(backbone.output, reverse=True)
    model = keras.Model(backbone.input, logits)
    # Adam changes every weight that has a gradient by about the learning rate.
    model.compile(
        optimizer=keras.optimizers.Adam(0.01, epsilon=1e-12),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    before = {name: weight.numpy() for name, weight in backbone.named_weights().items()}
    model.fit(INPUTS, np.roll(IDS, -1, axis=1), epochs=1, verbose=0)
    for name, weight in backbone.named_weights().items():
        moved = np.abs(weight.numpy() - before[name])
        assert np.isfinite(moved).all(), name
        assert np.mean(moved > 1e-3) > 0.9, name


def test_frozen_backbone_has_no_trainable_variables():
    backbone = GemmaBackbone(**GEMMA1)
    backbone.trainable = False
    assert not backbone.trainable_variables
    assert len(backbone.variables) == len(backbone.named_weights())


def test_dropout_only_in_training():
    backbone = GemmaBackbone(**GEMMA1 | {"dropout": 0.5})
    plain = ops.convert_to_numpy(backbone(INPUTS))
    np.testing.assert_array_equal(ops.convert_to_numpy(backbone(INPUTS, training=False)), plain)
    dropped = ops.convert_to_numpy(backbone(INPUTS, training=True))
    assert np.abs(dropped - plain).max() > 1e-3
    again = ops.convert_to_numpy(backbone(INPUTS, training=True))
    assert np.abs(dropped - again).max() > 1e-3


def test_without_dropout_training_changes_nothing():
    backbone = GemmaBackbone(**GEMMA1)
    np.testing.assert_array_equal(
        ops.convert_to_numpy(backbone(INPUTS, training=True)),
        ops.convert_to_numpy(backbone(INPUTS)),
    )

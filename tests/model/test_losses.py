"""Losses in chunks and their gradients, compared with losses of all logits."""

from functools import partial

import keras
import numpy as np
import pytest
from keras import ops

from keras_gemma import losses
from tests.conftest import TEXTS
from tests.models import make_lm


def plain(self):
    """Compiles a model to train from all logits, as Keras does."""
    self.compile(
        optimizer=keras.optimizers.SGD(0.5),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=self.reduction),
        metrics=[keras.metrics.MeanMetricWrapper(lambda y, x: ops.zeros(()), name="none")],
        weighted_metrics=[keras.metrics.SparseCategoricalAccuracy()],
    )


def in_chunks(self):
    self.compile(
        optimizer=keras.optimizers.SGD(0.5),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=self.reduction),
    )


def batch():
    random = np.random.default_rng(0)
    ids = random.integers(0, 512, (3, 21)).astype("int32")
    mask = np.ones_like(ids)
    mask[1, 9:] = 0
    weights = random.integers(0, 3, (3, 21)).astype("float32") * mask
    return {"token_ids": ids, "padding_mask": mask}, np.roll(ids, -1, axis=1), weights


@pytest.mark.parametrize("head", ["learned", "frozen"])
@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "mean_with_sample_weight", "sum"])
def test_step_equals_that_of_all_logits(reduction, head, monkeypatch):
    monkeypatch.setattr(losses, "MAX_TRAINED_LOGITS", 512 * 3 * 4)  # chunks of 4 of 21 positions
    x, y, weights = batch()
    results = []
    for compile_it in (plain, in_chunks):
        lm = make_lm("gemma2_grouped")
        lm.reduction = reduction
        lm.backbone.token_embedding.trainable = head == "learned"
        compile_it(lm)
        tested = lm.test_on_batch(x, y, weights, return_dict=True)
        trained = lm.train_on_batch(x, y, weights, return_dict=True)
        names = ("loss", "sparse_categorical_accuracy")
        figures = [float(logs[name]) for logs in (tested, trained) for name in names]
        results.append((figures, [w.numpy() for w in lm.backbone.named_weights().values()]))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-5)
    for mine, theirs in zip(results[0][1], results[1][1], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=2e-5)


def test_fit_never_has_all_logits(tiny_proto, monkeypatch):
    """The head never computes more than a chunk, even while tracing."""
    monkeypatch.setattr(losses, "MAX_TRAINED_LOGITS", 512 * 2 * 4)
    seen = []
    for name in ("_sums", "_with_gradient"):

        def watch(compute, x, *rest):
            seen.append(x.shape[1])
            return compute(x, *rest)

        monkeypatch.setattr(losses, name, partial(watch, getattr(losses, name)))
    lm = make_lm(proto=tiny_proto, sequence_length=16)
    lm.compile(optimizer=keras.optimizers.SGD(0.1))
    history = lm.fit(TEXTS[:4], batch_size=2, validation_data=TEXTS[4:6], epochs=2, verbose=0)
    assert history.history["loss"][1] < history.history["loss"][0]
    assert set(seen) <= {2, 4}
    assert {"val_loss", "val_sparse_categorical_accuracy"} <= history.history.keys()
    assert lm.predict(TEXTS[:2], verbose=0).shape == (2, 16, 512)

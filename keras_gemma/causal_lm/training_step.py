"""Training and evaluation that compute the loss in chunks, without the logits of a whole batch.

This applies to the default loss, the cross entropy of the next token, and its accuracy. With any
other loss or metric, the model returns logits as usual.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import keras
from keras import ops

from keras_gemma.losses import loss_and_hits

_without_head: ContextVar[bool] = ContextVar("without_head", default=False)
"""True within a training or test step: `call` then returns hidden states instead of logits."""

LOSS = keras.losses.SparseCategoricalCrossentropy
ACCURACY = keras.metrics.SparseCategoricalAccuracy


@contextmanager
def _omit_head() -> Iterator[None]:
    token = _without_head.set(True)
    try:
        yield
    finally:
        _without_head.reset(token)


class ChunkedLossTrainer:
    """Mixin for a functional Keras model whose head is the embedding of its `backbone`."""

    _loss_in_chunks: Any = None

    def _set_chunked_loss(self, loss: Any, metrics: Any, weighted_metrics: Any) -> None:
        """Enables the chunked loss if the arguments of `compile` allow it."""
        weighted = list(weighted_metrics) if isinstance(weighted_metrics, list | tuple) else []
        is_default = (
            type(loss) is LOSS
            and loss.get_config()["from_logits"]
            and loss.get_config().get("ignore_class") is None
            and loss.reduction in ("sum_over_batch_size", "mean", "mean_with_sample_weight", "sum")
            and not metrics
            and (not weighted_metrics or weighted)
            and all(type(metric) is ACCURACY for metric in weighted)
        )
        self._loss_in_chunks = loss if is_default else None

    def train_step(self, *args: Any) -> Any:
        if self._loss_in_chunks is None:
            return super().train_step(*args)
        with _omit_head():
            return super().train_step(*args)

    def test_step(self, *args: Any) -> Any:
        if self._loss_in_chunks is None:
            return super().test_step(*args)
        with _omit_head():
            return super().test_step(*args)

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        if _without_head.get():
            return self.backbone(inputs, training=training)
        return super().call(inputs, training=training, mask=mask)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        if not _without_head.get():
            return super().compute_loss(x, y, y_pred, sample_weight, training)
        y = ops.cast(y[..., 0] if len(y.shape) == 3 else y, "int32")
        weights = ops.ones_like(y, dtype="float32")
        if sample_weight is not None:
            sample_weight = ops.cast(sample_weight, "float32")
            weights = weights * (
                sample_weight[:, None] if len(sample_weight.shape) == 1 else sample_weight
            )
        embedding = self.backbone.token_embedding
        learn_head = training and bool(embedding.trainable_variables)
        head = embedding.tensor
        if not learn_head:  # as tensors, because TensorFlow needs a gradient for each variable
            head = keras.tree.map_structure(
                lambda part: part if part is None else ops.stop_gradient(part), head
            )
        config = self.backbone.config
        sums = loss_and_hits(y_pred, y, weights, head, config, training, learn_head)
        weight = ops.sum(weights)
        metrics = self._compile_metrics
        if metrics is not None and not metrics.built:  # TensorFlow builds them lazily.
            metrics.build(y, y_pred)
        for accuracy in metrics.metrics if metrics is not None else ():
            hits = ops.divide_no_nan(ops.stop_gradient(sums[1]), weight)
            keras.metrics.Mean.update_state(accuracy, hits, sample_weight=weight)
        loss = sums[0]
        reduction = self._loss_in_chunks.reduction
        if reduction == "mean_with_sample_weight" and sample_weight is not None:
            loss = ops.divide_no_nan(loss, weight)
        elif reduction != "sum":
            loss = loss / ops.cast(ops.prod(ops.shape(weights)), "float32")
        return sum(self.losses, loss)

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        if not _without_head.get():
            return super().compute_metrics(x, y, y_pred, sample_weight)
        return self.get_metrics_result()  # `compute_loss` has updated them.

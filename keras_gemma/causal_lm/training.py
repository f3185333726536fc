"""Training of `GemmaCausalLM` with Keras: strings as data, and the loss in chunks.

Everything that overrides the training protocol of `keras.Model` is here and in the base class,
`model/trainable.py`. One training step calls:

    fit                  strings -> token ids, labels, weights
      train_step         makes `_omits_head` true, in its thread only
        call             hidden states `[B, T, D]` instead of logits `[B, T, V]`
        compute_loss     loss and accuracy, from the hidden states, in chunks of logits
        compute_metrics  what `compute_loss` has updated

The logits of a whole batch are often the largest array of a training step. They are only computed
if `compile` was called with another loss or metric than the default ones.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
from keras import ops

from keras_gemma.backend import keras_internals
from keras_gemma.losses import loss_and_hits
from keras_gemma.model.trainable import TrainableModel
from keras_gemma.model.weights import stop_gradients
from keras_gemma.text.batches import encode_inputs, has_fixed_order

LOSS = keras.losses.SparseCategoricalCrossentropy
ACCURACY = keras.metrics.SparseCategoricalAccuracy


class TrainableTextModel(TrainableModel):
    """Functional model with a `backbone`, whose embedding is its head, and a `preprocessor`.

    The preprocessor encodes strings. It may be `None`.
    """

    _chunked_loss: Any = None
    """Loss that is computed in chunks. `None` uses the steps of `keras.Model`."""

    _omitting_thread: int | None = None
    """Thread within a step with a chunked loss. Other threads may call the model meanwhile."""

    @property
    def _omits_head(self) -> bool:
        """True within a step with a chunked loss: `call` then returns hidden states."""
        return self._omitting_thread == threading.get_ident()

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        *args: Any,
        sample_weight: Any = None,
        validation_data: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Same as `keras.Model.fit`, for strings too if there is a preprocessor.

        As in KerasHub, the default loss is the mean over all positions, including padding, whose
        loss is 0: short texts in long rows have a small loss. The accuracy is the mean over the
        tokens. For the loss per token, pass to `compile` a `SparseCategoricalCrossentropy` with
        `from_logits=True, reduction="mean_with_sample_weight"`.
        """
        x, y, sample_weight = self._encode(x, y, sample_weight)
        if has_fixed_order(x):
            kwargs["shuffle"] = False
        if validation_data is not None:
            if isinstance(validation_data, tuple):
                validation_data = self._encode(*validation_data)
            else:
                validation_data = self._encode(validation_data)
            if validation_data[1] is None:
                validation_data = validation_data[0]
        return super().fit(
            x,
            y,
            batch_size,
            *args,
            sample_weight=sample_weight,
            validation_data=validation_data,
            **kwargs,
        )

    def evaluate(
        self, x: Any = None, y: Any = None, *args: Any, sample_weight: Any = None, **kwargs: Any
    ) -> Any:
        """Same as `keras.Model.evaluate`, for strings too if there is a preprocessor."""
        x, y, sample_weight = self._encode(x, y, sample_weight)
        return super().evaluate(x, y, *args, sample_weight=sample_weight, **kwargs)

    def predict(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Same as `keras.Model.predict`, for strings too: float32 logits `[B, S, V]`."""
        x, _, _ = self._encode(x)
        return super().predict(x, *args, **kwargs)

    def train_on_batch(
        self, x: Any, y: Any = None, sample_weight: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Same as `keras.Model.train_on_batch`, for strings too if there is a preprocessor."""
        return super().train_on_batch(*self._encode(x, y, sample_weight), *args, **kwargs)

    def test_on_batch(
        self, x: Any, y: Any = None, sample_weight: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Same as `keras.Model.test_on_batch`, for strings too if there is a preprocessor."""
        return super().test_on_batch(*self._encode(x, y, sample_weight), *args, **kwargs)

    def predict_on_batch(self, x: Any) -> Any:
        """Same as `keras.Model.predict_on_batch`, for strings too: float32 logits `[B, S, V]`."""
        return super().predict_on_batch(self._encode(x)[0])

    def _encode(self, x: Any, y: Any = None, sample_weight: Any = None) -> tuple[Any, Any, Any]:
        """Returns inputs, labels and weights for strings; other data is unchanged."""
        return encode_inputs(self.preprocessor, x, y, sample_weight)

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
        self._chunked_loss = loss if is_default else None

    @contextmanager
    def _omit_head(self) -> Iterator[None]:
        self._omitting_thread = threading.get_ident()
        try:
            yield
        finally:
            self._omitting_thread = None

    def train_step(self, *args: Any) -> Any:
        if self._chunked_loss is None:
            return super().train_step(*args)
        with self._omit_head():
            return super().train_step(*args)

    def test_step(self, *args: Any) -> Any:
        if self._chunked_loss is None:
            return super().test_step(*args)
        with self._omit_head():
            return super().test_step(*args)

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        if self._omits_head:
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
        if not self._omits_head:
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
            head = stop_gradients(head)
        config = self.backbone.config
        sums = loss_and_hits(y_pred, y, weights, head, config, training, learn_head)
        weight = ops.sum(weights)
        metrics = keras_internals.compile_metrics(self)
        if metrics is not None and not metrics.built:  # TensorFlow builds them lazily.
            metrics.build(y, y_pred)
        for accuracy in metrics.metrics if metrics is not None else ():
            hits = ops.divide_no_nan(ops.stop_gradient(sums[1]), weight)
            keras.metrics.Mean.update_state(accuracy, hits, sample_weight=weight)
        loss = sums[0]
        reduction = self._chunked_loss.reduction
        if reduction == "mean_with_sample_weight" and sample_weight is not None:
            loss = ops.divide_no_nan(loss, weight)
        elif reduction != "sum":
            loss = loss / ops.cast(ops.prod(ops.shape(weights)), "float32")
        return sum(self.losses, loss)

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        if not self._omits_head:
            return super().compute_metrics(x, y, y_pred, sample_weight)
        return self.get_metrics_result()  # `compute_loss` has updated them.

"""Keras model whose `fit`, `evaluate` and `predict` accept strings."""

from typing import Any

import keras

from keras_gemma.text.batches import encode_inputs, has_fixed_order


class TextTrainer(keras.Model):
    """Base class that passes string inputs through `self.preprocessor`, which may be `None`."""

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
        """Same as `keras.Model.fit`, for strings too if there is a preprocessor."""
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

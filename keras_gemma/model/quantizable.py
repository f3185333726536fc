"""Quantization methods shared by the models with and without a head."""

from collections.abc import Mapping
from typing import Any

import keras

from keras_gemma.quantization import QuantizationConfig, to_config


class Quantizable:
    """Mixin for Keras models with a custom `quantize`, implemented by `_quantize`."""

    in_fit = False
    """True if `fit` is running."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        model = super().__new__(cls, *args, **kwargs)
        # Keras wraps each object's `quantize` to validate Keras's own modes and settings.
        vars(model).pop("quantize", None)
        return model

    def quantize(
        self,
        mode: Any,
        group_size: int = 32,
        zeros: bool = False,
        embedding: str = "int8",
        *,
        calibration: Any = None,
    ) -> None:
        """Quantizes the matrices to 8 or 4 bits in place, one at a time to save memory.

        Generation, scoring and saved presets then use these weights. Matrices and norms are frozen,
        and an optimizer that trained them is reset. `from_preset(..., quantization=...)` quantizes
        while loading. If an error is raised, the model is unchanged.

        Args:
            mode: `"int8"` (one scale per row), `"int4"`, or a `QuantizationConfig` or its
                dictionary with all settings.
            group_size: Numbers of a row that share a scale (`"int4"` only).
            zeros: If True, each group has a zero point (`"int4"` only).
            embedding: Mode of the embedding (`"int4"` only).
            calibration: Representative texts, or lists of token ids. Their activation statistics
                weight the quantization error per input channel. A backbone accepts ids only.
                Texts are truncated to the context length.

        Raises:
            ValueError: If the model is already quantized or in `fit`, the mode or settings are
                invalid, the group size does not divide the rows, weights are not finite, or
                calibration is empty or has strings without a preprocessor.
            TypeError: If `calibration` has another type.

        Example:

        ```python
        import keras_gemma

        lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
        lm.quantize("int4", calibration=["Before we proceed any further, hear me speak."])
        print(keras_gemma.quantization.report(lm))
        ```
        """
        if isinstance(mode, QuantizationConfig | Mapping):
            config = to_config(mode)
            if (group_size, zeros, embedding) != (32, False, "int8"):
                raise ValueError(
                    "`mode` is a config or a dictionary with all settings: set `group_size`, "
                    f"`zeros` and `embedding` in it. Received: group_size={group_size!r}, "
                    f"zeros={zeros!r}, embedding={embedding!r}, mode={config}"
                )
        else:
            config = QuantizationConfig(mode, group_size, zeros, embedding)
        self._quantize(config, calibration)

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """Same as `keras.Model.fit`, but checks first that the model is trainable."""
        self._check_trainable()
        self.in_fit = True
        try:
            return super().fit(*args, **kwargs)
        finally:
            self.in_fit = False

    def train_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Same as `keras.Model.train_on_batch`, but checks first that the model is trainable."""
        self._check_trainable()
        return super().train_on_batch(*args, **kwargs)

    def _check_trainable(self) -> None:
        backbone = getattr(self, "backbone", self)
        backbone.adapters.check_trainable()
        quantization = backbone.quantization
        if quantization is not None and not self.trainable_variables:
            raise ValueError(
                f"Nothing of this model can be trained: its weights are {quantization.describe()}. "
                "Train in floating point, and quantize afterwards; or call `enable_lora()`, whose "
                "adapters are trainable."
            )

    def summary(self, *args: Any, print_fn: Any = None, **kwargs: Any) -> None:
        """Prints the Keras summary, and the weights' dtype, quantization and bytes."""
        super().summary(*args, print_fn=print_fn, **kwargs)
        (print_fn or print)(describe_weights(getattr(self, "backbone", self)))


def let_go(model: keras.Model) -> None:
    """Drops PyTorch's references to the variables of `model`, so that replaced ones are freed.

    Keras collects the references again when it needs them.
    """
    for layer in model._flatten_layers():
        if hasattr(layer, "_torch_params"):
            del layer._torch_params


def forget_training(model: keras.Model) -> None:
    """Makes Keras compile `fit`, `evaluate` and `predict` again for the current weights.

    Resets the optimizer if it has slots for variables that are no longer trainable. Inactive
    adapters count as trainable.
    """
    model.train_function = model.test_function = model.predict_function = None
    optimizer = getattr(model, "optimizer", None)
    adapters = getattr(model, "backbone", model).adapters.variables()
    trained = {id(variable) for variable in (*model.trainable_variables, *adapters)}
    if any(id(variable) not in trained for variable in trained_by(optimizer)):
        start_anew(optimizer)


def trained_by(optimizer: keras.Optimizer | None) -> list[keras.Variable]:
    """Returns the variables that an optimizer was built for."""
    if optimizer is None or not optimizer.built:
        return []
    return optimizer._trainable_variables  # no public name


def start_anew(optimizer: keras.Optimizer) -> None:
    """Resets an optimizer in place, freeing its slot variables.

    In place because Keras and user code may hold references to it.
    """
    for one in (optimizer, getattr(optimizer, "inner_optimizer", None)):
        if one is not None:
            fresh = type(one).from_config(one.get_config())
            vars(one).clear()
            vars(one).update(vars(fresh))


def check_not_in_fit(models: list[Any], verb: str) -> None:
    """Raises a ValueError if one of `models` is being trained."""
    if any(model.in_fit for model in models):
        raise ValueError(f"The model is being trained: {verb} when `fit` has returned.")


def check_policy(policy: Any) -> None:
    """Raises a ValueError for Keras quantization policies, which need other layers."""
    if isinstance(policy, keras.dtype_policies.QuantizedDTypePolicy):
        dtype = policy.compute_dtype
        raise ValueError(
            "`dtype` must be a floating-point dtype. For 8 and 4 bits, pass "
            f"dtype={dtype!r}, quantization='int8'. Received: dtype={policy.name!r}"
        )


def describe_weights(backbone: Any) -> str:
    """Returns the dtype, quantization and memory of a backbone's weights, and its adapters."""
    quantization = backbone.quantization
    size = sum(weight.bytes for weight in backbone.named_weights().values())
    weights = (
        f" Weights: {backbone.variable_dtype}, computing in {backbone.compute_dtype}; "
        f"{quantization.describe() if quantization else 'not quantized'}; {size / 1e6:,.1f} MB"
    )
    return "\n".join(filter(None, (weights, backbone.adapters.describe())))

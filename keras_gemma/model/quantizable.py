"""What the two models, with and without a head, share: `quantize`, and what follows from it."""

from collections.abc import Mapping
from typing import Any

import keras

from keras_gemma.quantization import QuantizationConfig, to_config


class Quantizable:
    """A base of Keras models with a `quantize` of their own; they say how in `_quantize`."""

    in_fit = False
    """Whether `fit` is at work."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        model = super().__new__(cls, *args, **kwargs)
        # Keras wraps that of each object to check for modes and settings that are Keras's own.
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
        """Put the matrices into 8 or 4 bits, one after the other: no second model is in memory.

        Generation, scores and saved presets go on with these weights; neither they nor norms are
        trained afterwards, and an optimizer that trained them starts anew, without its moments.
        `from_preset(..., quantization=...)` does it while it loads. Where something is wrong, the
        model stays as it was.

        Args:
            mode: `"int8"`, with a scale a row; `"int4"`; or a `QuantizationConfig`, or its
                dictionary, with all the rest.
            group_size: of `"int4"`: how many numbers of a row share a scale.
            zeros: of `"int4"`: whether each group has a zero point too.
            embedding: of `"int4"`: bits of the embedding.
            calibration: a few texts, or lists of ids, as the model will read: what they are
                multiplied with decides where a matrix has to be most precise. A backbone reads
                ids alone. Of each, as much counts as the context holds.

        Raises:
            ValueError: the model is quantized already or in `fit`; an unknown mode, settings
                beside a config, rows that the groups do not fill; weights that are not finite;
                calibration without texts, or with strings and no preprocessor.
            TypeError: calibration of another type.

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
                    "`mode` is a config or a dictionary and holds all settings: put `group_size`, "
                    f"`zeros` and `embedding` there. Received: group_size={group_size!r}, "
                    f"zeros={zeros!r}, embedding={embedding!r} beside mode={config}"
                )
        else:
            config = QuantizationConfig(mode, group_size, zeros, embedding)
        self._quantize(config, calibration)

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """`keras.Model.fit`, where there is something to train."""
        self._check_trainable()
        self.in_fit = True
        try:
            return super().fit(*args, **kwargs)
        finally:
            self.in_fit = False

    def train_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """`keras.Model.train_on_batch`, where there is something to train."""
        self._check_trainable()
        return super().train_on_batch(*args, **kwargs)

    def _check_trainable(self) -> None:
        backbone = getattr(self, "backbone", self)
        backbone.adapters.check_trainable()
        quantization = backbone.quantization
        if quantization is not None and not self.trainable_variables:
            raise ValueError(
                f"Nothing of this model can be trained: its weights are {quantization.describe()}. "
                "Train in floating point, and quantize afterwards; or `enable_lora()`, whose "
                "adapters are trained beside them."
            )

    def summary(self, *args: Any, print_fn: Any = None, **kwargs: Any) -> None:
        """`keras.Model.summary`, and a line on the weights' dtype, quantization and bytes."""
        super().summary(*args, print_fn=print_fn, **kwargs)
        (print_fn or print)(describe_weights(getattr(self, "backbone", self)))


def let_go(model: keras.Model) -> None:
    """Give up what PyTorch's modules hold of the variables of `model`, so that one that is replaced
    is freed at once. Keras collects them again when they are next asked for."""
    for layer in model._flatten_layers():
        if hasattr(layer, "_torch_params"):
            del layer._torch_params


def forget_training(model: keras.Model) -> None:
    """Let Keras compile `fit`, `evaluate` and `predict` anew, on the weights as they are.

    Where the optimizer has trained what is trained no more, it starts anew, with the same
    settings. An adapter that is off for now may be trained again.
    """
    model.train_function = model.test_function = model.predict_function = None
    optimizer = getattr(model, "optimizer", None)
    adapters = getattr(model, "backbone", model).adapters.variables()
    trained = {id(variable) for variable in (*model.trainable_variables, *adapters)}
    if any(id(variable) not in trained for variable in trained_by(optimizer)):
        start_anew(optimizer)


def trained_by(optimizer: keras.Optimizer | None) -> list[keras.Variable]:
    """The variables that an optimizer was built for."""
    if optimizer is None or not optimizer.built:
        return []
    return optimizer._trainable_variables  # no public name


def start_anew(optimizer: keras.Optimizer) -> None:
    """Free what `optimizer` trained, and moments of that size. Where it is, for Keras keeps it in
    several places, and users may too."""
    for one in (optimizer, getattr(optimizer, "inner_optimizer", None)):
        if one is not None:
            fresh = type(one).from_config(one.get_config())
            vars(one).clear()
            vars(one).update(vars(fresh))


def check_not_in_fit(models: list[Any], verb: str) -> None:
    """Raise a ValueError where one of `models` is being trained."""
    if any(model.in_fit for model in models):
        raise ValueError(f"The model is being trained: {verb} when `fit` has returned.")


def check_policy(policy: Any) -> None:
    """Raise a ValueError for a policy of Keras's own quantization, which has other layers."""
    if isinstance(policy, keras.dtype_policies.QuantizedDTypePolicy):
        dtype = policy.compute_dtype
        raise ValueError(
            "`dtype` must be of floating point; 8 and 4 bits are `quantization`: pass "
            f"dtype={dtype!r}, quantization='int8'. Received: dtype={policy.name!r}"
        )


def describe_weights(backbone: Any) -> str:
    """Lines on dtype, quantization and memory of a `GemmaBackbone`'s weights, and on adapters."""
    quantization = backbone.quantization
    size = sum(weight.bytes for weight in backbone.named_weights().values())
    weights = (
        f" Weights: {backbone.variable_dtype}, computing in {backbone.compute_dtype}; "
        f"{quantization.describe() if quantization else 'not quantized'}; {size / 1e6:,.1f} MB"
    )
    return "\n".join(filter(None, (weights, backbone.adapters.describe())))

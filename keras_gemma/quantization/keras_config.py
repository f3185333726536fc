"""Quantization configs of Keras, `keras.quantizers.*Config`, as configs of this package.

Keras's int8 and int4 also quantize activations by default. Here activations stay in floating point,
which is more exact. GPTQ and AWQ round with the help of sample texts, as calibration does here, but
by other rules, so the numbers differ.
"""

import itertools
import warnings
from typing import Any

import keras

from keras_gemma.quantization.config import QuantizationConfig


def is_keras_config(config: Any) -> bool:
    """Returns True if `config` is a quantization config of Keras."""
    # Earlier releases of Keras have no such configs.
    return isinstance(config, getattr(keras.quantizers, "QuantizationConfig", ()))


def from_keras_config(config: Any) -> tuple[QuantizationConfig, Any]:
    """Returns the config of this package that comes closest, and texts for calibration or `None`.

    Raises:
        ValueError: If the config has another precision, or quantizers of its own.
    """
    name = type(config).__name__
    if name in ("GPTQConfig", "AWQConfig"):
        if config.weight_bits != 4:
            raise ValueError(
                f"`config` must have weight_bits=4. Received: {name} with "
                f"weight_bits={config.weight_bits}"
            )
        warnings.warn(
            f"{name} is replaced by int4 with calibration: the rounding weighs errors by the "
            "activations of the data set, but does not follow the published algorithm.",
            UserWarning,
            stacklevel=4,
        )
        # GPTQ in Keras is asymmetric unless `symmetric`, and AWQ always is.
        zero_points = not getattr(config, "symmetric", False)
        data = list(itertools.islice(config.dataset, config.num_samples))
        return QuantizationConfig("int4", config.group_size, zero_points), data
    if name not in ("Int8QuantizationConfig", "Int4QuantizationConfig"):
        raise ValueError(
            "`config` must be an Int8QuantizationConfig, Int4QuantizationConfig, GPTQConfig or "
            f"AWQConfig of `keras.quantizers`. Received: config={config!r}"
        )
    if config.weight_quantizer is not None:
        raise ValueError(
            "`config` must not have a `weight_quantizer`, because weights are rounded to the least "
            f"squared error. Received: weight_quantizer={config.weight_quantizer!r}"
        )
    if name == "Int8QuantizationConfig":
        return QuantizationConfig("int8"), None
    if config.block_size in (None, -1):
        raise ValueError(
            "`config` must have a `block_size`, such as 32, because int4 weights have a scale per "
            f"group. Received: block_size={config.block_size!r}"
        )
    return QuantizationConfig("int4", config.block_size, zero_points=True), None

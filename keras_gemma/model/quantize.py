"""Quantization of a model in place, one matrix at a time."""

from collections.abc import Mapping
from typing import Any

import keras

from keras_gemma.checks import check_one_of
from keras_gemma.model.matrix import MatrixLayer
from keras_gemma.model.trainable import release_variables, reset_training
from keras_gemma.quantization import AS_STORED, MODES, QuantizationConfig, to_config
from keras_gemma.quantization.calibration import mean_squares, read_rows
from keras_gemma.quantization.keras_config import from_keras_config, is_keras_config


def read_mode(
    mode: Any,
    config: Any,
    group_size: int,
    zero_points: bool,
    embedding: str,
    zeros: bool | None,
) -> tuple[QuantizationConfig, Any]:
    """Returns what the arguments of `GemmaCausalLM.quantize` describe: the configuration, and the
    texts of a Keras config or `None`."""
    if config is not None:
        if not is_keras_config(config):
            raise TypeError(
                "`config` must be a config of `keras.quantizers`. For a `QuantizationConfig` of "
                f"this package, pass it as `mode`. Received: config={config!r}"
            )
        if mode not in (None, config.mode):
            raise ValueError(
                f"`mode` must be that of `config`, {config.mode!r}, or left out. "
                f"Received: mode={mode!r}"
            )
        return from_keras_config(config)
    return _read_mode(mode, group_size, zero_points, embedding, zeros), None


def _read_mode(
    mode: Any, group_size: int, zero_points: bool, embedding: str, zeros: bool | None
) -> QuantizationConfig:
    zero_points = zero_points if zeros is None else zeros
    if not isinstance(mode, QuantizationConfig | Mapping):
        _check_mode(mode)
        return QuantizationConfig(mode, group_size, zero_points, embedding)
    config = to_config(mode)
    _check_mode(config.mode)
    if (group_size, zero_points, embedding) != (32, False, "int8"):
        raise ValueError(
            "`mode` is a config or a dictionary with all settings: set `group_size`, "
            f"`zero_points` and `embedding` in it. Received: group_size={group_size!r}, "
            f"zero_points={zero_points!r}, embedding={embedding!r}, mode={config}"
        )
    return config


def _check_mode(mode: Any) -> None:
    if mode == AS_STORED:
        raise ValueError(
            "`mode` must be 'int8' or 'int4' for a model in memory. To keep the numbers of a GGUF "
            "file, load it with `from_preset('model.gguf', quantization='as_stored')`. "
            f"Received: mode={mode!r}"
        )
    check_one_of("mode", mode, MODES)


def quantize(backbone: Any, config: QuantizationConfig, calibration: Any = None) -> None:
    """Quantizes the matrices of a backbone in place. If an error is raised, it is unchanged."""
    if backbone.quantization is not None:
        raise ValueError(
            f"The model is quantized already ({backbone.quantization.describe()}), and quantizing "
            "again would lose more precision. Load it in floating point, or with "
            f"`from_preset(..., quantization=...)`. Received: mode={config.mode!r}"
        )
    backbone.adapters.check_not_merged("quantize")
    config.check_shapes(backbone.config.weight_shapes())
    rows = [] if calibration is None else read_rows(calibration, backbone.config)
    layers = backbone.weight_layers().items()
    matrices = {name: layer for name, layer in layers if isinstance(layer, MatrixLayer)}
    for name, layer in matrices.items():
        layer.check_quantizes(name, config)
    importance = mean_squares(backbone, rows)
    backbone.adapters.base_variables = []  # no longer trainable
    release_variables(backbone)
    for name, layer in matrices.items():
        layer.quantize_matrix(name, config, importance.get(name))
    freeze_floats(backbone)
    reset_training(backbone)


def freeze_floats(backbone: Any) -> None:
    """Freezes all weights of a quantized backbone that are not quantized."""
    for layer in backbone.weight_layers().values():
        if not isinstance(layer, MatrixLayer):
            layer.trainable = False
        elif layer.quantization is None:
            layer.variables_of_matrix.trainable = False


def check_policy(policy: Any) -> None:
    """Raises a ValueError for Keras quantization policies, which need other layers."""
    if isinstance(policy, keras.dtype_policies.QuantizedDTypePolicy):
        dtype = policy.compute_dtype
        raise ValueError(
            "`dtype` must be a floating-point dtype. For 8 and 4 bits, pass "
            f"dtype={dtype!r}, quantization='int8'. Received: dtype={policy.name!r}"
        )

"""Quantization of weights to int8 and int4.

    config.py       mode, group size and bits of each weight
    keras_config.py configs of `keras.quantizers`
    array.py        fitting of scales and values to one matrix
    calibration.py  activation statistics that weight the quantization error
    report.py       size and error of each weight of a model

`backend/` stores and multiplies quantized matrices. `model/` has the layers that hold them.
"""

from keras_gemma.quantization.array import (
    dequantize_array,
    quantize_array,
    quantize_rows,
    relative_error,
)
from keras_gemma.quantization.config import (
    AS_STORED,
    MODES,
    STORED_TYPES,
    QuantizationConfig,
    join,
    to_config,
)
from keras_gemma.quantization.report import Report, WeightReport, report

__all__ = [
    "AS_STORED",
    "MODES",
    "STORED_TYPES",
    "QuantizationConfig",
    "Report",
    "WeightReport",
    "dequantize_array",
    "join",
    "quantize_array",
    "quantize_rows",
    "relative_error",
    "report",
    "to_config",
]

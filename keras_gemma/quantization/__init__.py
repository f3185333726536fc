"""What 8 and 4 bits mean: settings, scales and values, errors.

    config.py  which weight has how many bits, and in groups of what size
    array.py   a matrix to scales and values
    report.py  what it did to a model

How a quantized matrix is stored and multiplied is `backend/`'s; the layers that hold one are
`model/`'s.
"""

from keras_gemma.quantization.array import (
    dequantize_array,
    quantize_array,
    quantize_rows,
    relative_error,
)
from keras_gemma.quantization.config import QuantizationConfig, to_config
from keras_gemma.quantization.report import Report, WeightReport, report

__all__ = [
    "QuantizationConfig",
    "Report",
    "WeightReport",
    "dequantize_array",
    "quantize_array",
    "quantize_rows",
    "relative_error",
    "report",
    "to_config",
]

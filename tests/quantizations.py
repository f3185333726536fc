"""Quantizations of tiny models."""

from keras_gemma import QuantizationConfig

MODES = {
    "int8": QuantizationConfig("int8"),
    "int4": QuantizationConfig("int4", 16),
    "int4_zeros": QuantizationConfig("int4", 16, zero_points=True),
    "int4_embedding": QuantizationConfig("int4", 16, embedding="int4"),
}
"""Quantizations in groups of 16, which fit all models of `tests.configurations`."""

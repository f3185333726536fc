"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864).

Element `i` of a head is paired with element `i + H/2`, as in the published weights.
"""

from typing import Any

import keras
from keras import ops

WAVELENGTH = 10_000.0
"""The base of the frequencies, in all of Gemma 1 and Gemma 2."""


def rotary_angles(positions: Any, head_dim: int) -> tuple[Any, Any]:
    """Cosine and sine of every pair's angle at `positions [B, T]` -> float32 `[B, T, 1, H/2]`.

    Always float32: bfloat16 cannot tell position 257 from 256.
    """
    exponents = ops.arange(0, head_dim, 2, dtype="float32") / head_dim
    frequencies = ops.power(WAVELENGTH, -exponents)
    angles = ops.cast(positions, "float32")[..., None, None] * frequencies
    return ops.cos(angles), ops.sin(angles)


def rotate(x: Any, cos: Any, sin: Any) -> Any:
    """Heads `x [B, T, N, H]` turned by their position's angles, in float32 until the end."""
    dtype = keras.backend.standardize_dtype(x.dtype)
    first, second = ops.split(ops.cast(x, "float32"), 2, axis=-1)
    turned = ops.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return ops.cast(turned, dtype)

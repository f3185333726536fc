"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864).

Element `i` of a head is paired with element `i + H/2`, as in the published weights.
"""

from typing import Any

import keras
from keras import ops

from keras_gemma.config import ROPE_THETA


def rotary_angles(
    positions: Any, head_dim: int, theta: float = ROPE_THETA, scaling: float = 1.0
) -> tuple[Any, Any]:
    """Returns the cosine and the signed sine of the angle of each head element.

    Both are float32 `[B, T, 1, H]`, in halves: `(cos, cos)` and `(-sin, sin)`. Float32, because 256
    and 257 are equal in bfloat16. Whole heads, because XLA would compute halves again for each head
    of each layer.
    """
    positions = ops.cast(positions, "float32") / scaling
    exponents = ops.arange(0, head_dim, 2, dtype="float32") / head_dim
    frequencies = theta**-exponents
    angles = positions[..., None, None] * frequencies
    cos, sin = ops.cos(angles), ops.sin(angles)
    return ops.concatenate([cos, cos], axis=-1), ops.concatenate([-sin, sin], axis=-1)


def rotate(x: Any, cos: Any, sin: Any) -> Any:
    """Rotates heads `x [B, T, N, H]` in float32, then rounds to the dtype of `x`."""
    dtype = keras.backend.standardize_dtype(x.dtype)
    x = ops.cast(x, "float32")
    first, second = ops.split(x, 2, axis=-1)
    return ops.cast(x * cos + ops.concatenate([second, first], axis=-1) * sin, dtype)

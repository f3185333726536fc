"""The gated half of a decoder block (GeGLU: Shazeer, 2020, arXiv:2002.05202)."""

from typing import Any

from keras import ops

from keras_gemma.model.hooks import Taps, tapped
from keras_gemma.model.matrix import matmul


def feed_forward(x: Any, gate: Any, up: Any, down: Any, taps: Taps = None) -> Any:
    """`down(gelu(gate(x)) * up(x))`, GELU by its tanh approximation.

    Args:
        x: `[B, T, D]`.
        gate, up: packed `[F, D]`.
        down: packed `[D, F]`.
        taps: see `taps.py`.

    Returns:
        `[B, T, D]`.
    """
    gated = ops.gelu(matmul(x, gate), approximate=True)
    gated = tapped(taps, "feed_forward.gate", gated)
    return matmul(gated * matmul(x, up), down)

"""Feed-forward half of a decoder block (GeGLU: Shazeer, 2020, arXiv:2002.05202)."""

from typing import Any

from keras import ops

from keras_gemma.model.hooks import Hooks, apply_hook
from keras_gemma.model.matrix import matmul


def feed_forward(x: Any, gate: Any, up: Any, down: Any, hooks: Hooks = None) -> Any:
    """Computes `down(gelu(gate(x)) * up(x))`, with the tanh approximation of GELU.

    Args:
        x: `[B, T, D]`.
        gate, up: Packed `[F, D]`.
        down: Packed `[D, F]`.
        hooks: Functions by hook point of the block.

    Returns:
        `[B, T, D]`.
    """
    gated = ops.gelu(matmul(x, gate), approximate=True)
    gated = apply_hook(hooks, "feed_forward.gate", gated)
    return matmul(gated * matmul(x, up), down)

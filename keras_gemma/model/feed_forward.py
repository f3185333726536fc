"""Feed-forward half of a decoder block (GeGLU: Shazeer, 2020, arXiv:2002.05202)."""

from typing import Any

from keras import ops

from keras_gemma.model.hooks import Hooks, apply_hook
from keras_gemma.model.matrix import matmul


def feed_forward(x: Any, gate: Any, up: Any, down: Any, hooks: Hooks = None) -> Any:
    """Computes `down(gelu(gate(x)) * up(x))` for `x [B, T, D]`, with the tanh form of GELU."""
    gated = apply_hook(hooks, "feed_forward.gate", ops.gelu(matmul(x, gate), approximate=True))
    return matmul(gated * matmul(x, up), down)

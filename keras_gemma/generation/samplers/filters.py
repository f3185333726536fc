"""Which tokens stay in the running: the k likeliest, the nucleus, those near the likeliest.

Each takes a value a row, traced, and no vocabulary is sorted: the smallest probability that stays
is found by halving the range of float32's bits, whose order is that of the numbers.
"""

from collections.abc import Callable
from typing import Any

from keras import ops

from keras_gemma.backend.reference import LOWEST

ONE = 0x3F800000
"""The bits of 1.0; 30 halvings from there find a number exactly."""


def _weights(logits: Any) -> Any:
    """Probabilities `[B, V]`, the likeliest being 1."""
    return ops.exp(logits - ops.max(logits, axis=-1, keepdims=True))


def _keep(logits: Any, weights: Any, enough: Callable[[Any], Any]) -> Any:
    """`logits` where the weight is at least the largest bound whose weights are `enough`.

    Args:
        enough: `kept bool [B, V] -> bool [B, 1]`, true of all weights.
    """
    bits = ops.view(weights, "int32")
    low = ops.zeros_like(bits[:, :1])
    high = low + ONE + 1

    def halve(_: Any, bounds: tuple[Any, Any]) -> tuple[Any, Any]:
        low, high = bounds
        middle = low + (high - low) // 2
        fits = enough(bits >= middle)
        return ops.where(fits, middle, low), ops.where(fits, high, middle)

    low, _ = ops.fori_loop(0, 31, halve, (low, high))
    return ops.where(bits >= low, logits, LOWEST)


def keep_top_k(logits: Any, k: Any) -> Any:
    """`logits [B, V]` with all but the `k [B]` largest out of the running; equals of the last stay.

    Fan et al., 2018, arXiv:1805.04833.
    """
    k = ops.minimum(k, logits.shape[-1])[:, None]

    def enough(kept: Any) -> Any:
        return ops.sum(ops.cast(kept, "int32"), axis=-1, keepdims=True) >= k

    return _keep(logits, _weights(logits), enough)


def keep_top_p(logits: Any, p: Any) -> Any:
    """`logits [B, V]` with all out of the running but the fewest that reach probability `p [B]`.

    Holtzman et al., 2019, arXiv:1904.09751.
    """
    weights = _weights(logits)
    # Sums of rounded probabilities may end below 1: then nothing would be enough.
    p = ops.minimum(p, 1 - 1e-6)[:, None] * ops.sum(weights, axis=-1, keepdims=True)

    def enough(kept: Any) -> Any:
        return ops.sum(ops.where(kept, weights, 0.0), axis=-1, keepdims=True) >= p

    return _keep(logits, weights, enough)


def keep_min_p(logits: Any, p: Any) -> Any:
    """`logits [B, V]` without the tokens less likely than `p [B]` times the likeliest.

    Nguyen et al., 2024, arXiv:2407.01082.
    """
    return ops.where(_weights(logits) >= p[:, None], logits, LOWEST)


FILTERS = {"top_k": keep_top_k, "top_p": keep_top_p, "min_p": keep_min_p}
"""In the order in which they are applied."""

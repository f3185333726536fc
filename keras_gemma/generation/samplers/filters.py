"""Filters of logits: top-k, top-p and min-p, with one value per row.

No filter sorts the vocabulary. A binary search over the bits of float32, which are ordered like
the numbers, finds the smallest probability to keep.
"""

from collections.abc import Callable
from typing import Any

from keras import ops

from keras_gemma.backend.reference import LOWEST

ONE_BITS = 0x3F800000
"""Bits of 1.0 in float32. 31 halvings find any number in [0, 1] exactly."""


def _weights(logits: Any) -> Any:
    """Returns probabilities `[B, V]` relative to the most likely token, which has 1."""
    return ops.exp(logits - ops.max(logits, axis=-1, keepdims=True))


def _keep(logits: Any, weights: Any, enough: Callable[[Any], Any]) -> Any:
    """Returns `logits` with the fewest of the largest weights that are `enough`; others are LOWEST.

    `enough` maps the kept tokens, bool `[B, V]`, to bool `[B, 1]`; True if all tokens are kept.
    """
    bits = ops.view(weights, "int32")
    low = ops.zeros_like(bits[:, :1])
    high = low + ONE_BITS + 1

    def halve(_: Any, bounds: tuple[Any, Any]) -> tuple[Any, Any]:
        low, high = bounds
        middle = low + (high - low) // 2
        fits = enough(bits >= middle)
        return ops.where(fits, middle, low), ops.where(fits, high, middle)

    low, _ = ops.fori_loop(0, 31, halve, (low, high))
    return ops.where(bits >= low, logits, LOWEST)


def keep_top_k(logits: Any, k: Any) -> Any:
    """Keeps the `k [B]` largest of `logits [B, V]`, and all that equal the k-th one.

    Fan et al., 2018, arXiv:1805.04833.
    """
    k = ops.minimum(k, logits.shape[-1])[:, None]

    def enough(kept: Any) -> Any:
        return ops.sum(ops.cast(kept, "int32"), axis=-1, keepdims=True) >= k

    return _keep(logits, _weights(logits), enough)


def keep_top_p(logits: Any, p: Any) -> Any:
    """Keeps the fewest of `logits [B, V]` whose total probability is at least `p [B]`.

    Holtzman et al., 2019, arXiv:1904.09751.
    """
    weights = _weights(logits)
    # Sums of rounded probabilities may be below 1; then no set of tokens would reach p=1.
    p = ops.minimum(p, 1 - 1e-6)[:, None] * ops.sum(weights, axis=-1, keepdims=True)

    def enough(kept: Any) -> Any:
        return ops.sum(ops.where(kept, weights, 0.0), axis=-1, keepdims=True) >= p

    return _keep(logits, weights, enough)


def keep_min_p(logits: Any, p: Any) -> Any:
    """Keeps the `logits [B, V]` with at least `p [B]` times the largest probability.

    Nguyen et al., 2024, arXiv:2407.01082.
    """
    return ops.where(_weights(logits) >= p[:, None], logits, LOWEST)


FILTERS = {"top_k": keep_top_k, "top_p": keep_top_p, "min_p": keep_min_p}
"""Filters by setting, in the order in which they are applied."""

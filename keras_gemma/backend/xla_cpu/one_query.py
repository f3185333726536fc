"""Attention of one query per sequence over its KV cache, for XLA on CPU.

`reference.attend` converts the cache to float32 and transposes its heads, which copies it several
times. Here the cache keeps its layout, `[B, S, K * H]`, and one bfloat16 product with float32 sums
reads it once. Each query is spread over all key heads, with zeros for the heads of other groups:

    K = 2, N = 4      key head      0   1
                      query head 0  q   0
                                 1  q   0
                                 2  0   q
                                 3  0   q

The K-fold arithmetic is free, because reading the cache takes most of the time.
"""

from collections.abc import Callable
from typing import Any

from keras import ops

from keras_gemma.backend.reference import LOWEST


def attend(
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    *,
    scale: float,
    soft_cap: float | None,
    product: Callable[[Any, Any, bool], Any],
) -> Any:
    """Same as `reference.attend`, for T = 1 and bfloat16.

    `product` multiplies `[B, M, I]` by `[B, I, R]`, or by `[B, R, I]` if its third argument is
    True -> float32 `[B, M, R]`.
    """
    b, _, n, h = ops.shape(query)
    s, k = ops.shape(key)[1:3]
    groups = n // k
    own = ops.arange(n, dtype="int32")[:, None] // groups == ops.arange(k, dtype="int32")[None]
    own = own[None, :, :, None]  # (1, N, K, 1)
    spread = ops.reshape(ops.where(own, query[:, 0, :, None], 0), (b, n, k * h))
    logits = product(ops.reshape(key, (b, s, k * h)), spread, True) * scale
    if soft_cap is not None:
        logits = ops.tanh(logits / soft_cap) * soft_cap
    logits = ops.transpose(logits, (0, 2, 1))  # (B, N, S)
    weights = ops.softmax(ops.where(mask, logits, LOWEST), axis=-1)
    weights = ops.where(mask, weights, 0.0)
    # Two bfloat16 numbers represent a weight with 16 bits of precision.
    coarse = ops.cast(weights, value.dtype)
    fine = ops.cast(weights - ops.cast(coarse, "float32"), value.dtype)
    both = ops.concatenate([coarse, fine], axis=1)
    heads = product(both, ops.reshape(value, (b, s, k * h)), False)
    heads = ops.reshape(heads[:, :n] + heads[:, n:], (b, n, k, h))
    heads = ops.sum(ops.where(own, heads, 0.0), axis=2)
    return ops.reshape(ops.cast(heads, value.dtype), (b, 1, n, h))

"""What the contract's functions mean, in `keras.ops` alone: slow, plain, and right.

The tests hold every backend against these. `attend` also serves the backends that have found
nothing better for a shape.
"""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

LOWEST = -(2.0**127)
"""Stands for minus infinity in masked logits; finite, so that a fully masked row has no NaN."""


def matmul(x: Any, weight: Any) -> Any:
    """`x [..., in]` times a weight `[out, in]` -> `[..., out]`."""
    return ops.matmul(x, ops.transpose(weight))


def matmul_back(y: Any, weight: Any) -> Any:
    """`y [..., out]` times a weight `[out, in]` -> `[..., in]`."""
    return ops.matmul(y, weight)


def embed(ids: Any, weight: Any) -> Any:
    """Rows `ids [...]` of `weight [V, D]` -> `[..., D]`."""
    return ops.take(weight, ids, axis=0)


def attend(
    query: Any, key: Any, value: Any, mask: Any, *, scale: float, soft_cap: float | None
) -> Any:
    """Attention of N query heads over K key/value heads, G = N / K of them to each.

    The order is Gemma 2's: scale the query, multiply, cap, mask, softmax in float32. A query
    that may see nothing gives zeros.

    Args:
        query: `[B, T, N, H]`.
        key, value: `[B, S, K, H]`.
        mask: bool `[B, T, S]`; True where the query may look.
        scale: factor of the query.
        soft_cap: `c` of `c * tanh(logits / c)`, or None.

    Returns:
        `[B, T, N, H]`, in the dtype of `value`.
    """
    weights = attention_weights(query, key, mask, scale=scale, soft_cap=soft_cap)
    return weigh(weights, value)


def attention_weights(
    query: Any, key: Any, mask: Any, *, scale: float, soft_cap: float | None
) -> Any:
    """The first half of `attend`: float32 `[B, K, G, T, S]`, zeros where the mask is False."""
    b, t, n, h = ops.shape(query)
    k = ops.shape(key)[2]
    query = ops.reshape(ops.cast(query, "float32") * scale, (b, t, k, n // k, h))
    logits = ops.einsum("btkgh,bskh->bkgts", query, ops.cast(key, "float32"))
    if soft_cap is not None:
        logits = ops.tanh(logits / soft_cap) * soft_cap
    mask = ops.expand_dims(ops.expand_dims(mask, 1), 1)  # (B, 1, 1, T, S)
    if logits.shape[-1] == 1:  # Keras warns of a softmax of one
        return ops.where(mask, ops.ones_like(logits), 0.0)
    weights = ops.softmax(ops.where(mask, logits, LOWEST), axis=-1)
    return ops.where(mask, weights, 0.0)


def weigh(weights: Any, value: Any) -> Any:
    """The second half: `weights [B, K, G, T, S]` of `value [B, S, K, H]` -> `[B, T, N, H]`."""
    b, k, g, t, _ = ops.shape(weights)
    h = ops.shape(value)[3]
    dtype = keras.backend.standardize_dtype(value.dtype)
    heads = ops.einsum("bkgts,bskh->btkgh", weights, ops.cast(value, "float32"))
    return ops.cast(ops.reshape(heads, (b, t, k * g, h)), dtype)


def cross_entropy(products: Any, target_ids: Any, soft_cap: float | None) -> tuple[Any, Any, Any]:
    """Cross entropy in nats of `products [..., V]`, capped, at ids `[...]`; may use them up.

    Returns:
        Losses, float32 `[...]`; whether the target has the largest logit, float32 `[...]`; and the
        losses' gradient by the products, `[..., V]` in their dtype.
    """
    dtype = keras.backend.standardize_dtype(products.dtype)
    logits = ops.cast(products, "float32")
    if soft_cap is not None:
        logits = ops.tanh(logits / soft_cap) * soft_cap
    targets = ops.expand_dims(target_ids, -1)
    chosen = ops.take_along_axis(logits, targets, axis=-1)
    largest = ops.max(logits, axis=-1, keepdims=True)
    log_sum = ops.log(ops.sum(ops.exp(logits - largest), axis=-1, keepdims=True)) + largest
    ids = ops.arange(products.shape[-1], dtype="int32")
    change = ops.exp(logits - log_sum) - ops.cast(ops.equal(ids, targets), "float32")
    if soft_cap is not None:
        change = change * (1.0 - ops.square(logits / soft_cap))
    hits = ops.cast(chosen >= largest, "float32")
    losses, hits = (ops.squeeze(x, -1) for x in (log_sum - chosen, hits))
    return losses, hits, ops.cast(change, dtype)


def map(function: Callable[[Any], Any], arrays: Any) -> Any:
    """`function` of `[...]` from each of `arrays [N, ...]`, in order, its answers stacked."""
    return ops.map(function, arrays)


def write_cache(cache: Any, new: Any, slots: Any) -> Any:
    """`cache [B, R, K, H]` with `new [B, T, K, H]` at slots `slots [B, T]` of each row."""
    for i in range(slots.shape[1]):
        here = ops.arange(ops.shape(cache)[1])[None, :] == slots[:, i : i + 1]
        cache = ops.where(here[:, :, None, None], new[:, i : i + 1], cache)
    return cache

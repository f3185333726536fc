"""Reference implementation of the contract in plain `keras.ops`, written for clarity.

The tests compare every backend with this module. Backends also use its `attend` for shapes that
have no faster form.
"""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

LOWEST = -(2.0**127)
"""Value of masked logits. Finite, so that a fully masked row has no NaN."""


def matmul(x: Any, weight: Any) -> Any:
    """Multiplies `x [..., in]` by a weight `[out, in]` -> `[..., out]`."""
    return ops.matmul(x, ops.transpose(weight))


def embed(ids: Any, weight: Any) -> Any:
    """Looks up rows `ids [...]` of `weight [V, D]` -> `[..., D]`."""
    return ops.take(weight, ids, axis=0)


def attend(
    query: Any, key: Any, value: Any, mask: Any, *, scale: float, soft_cap: float | None
) -> Any:
    """Computes grouped-query attention: N query heads, K key/value heads, G = N / K.

    Follows Gemma 2's order: scale the query, multiply, soft cap, mask, softmax in float32. Queries
    and the result are `[B, T, N, H]`, keys and values `[B, S, K, H]`. The bool mask `[B, T, S]` is
    True for visible positions. A fully masked query gives zeros.
    """
    return weigh(attention_weights(query, key, mask, scale=scale, soft_cap=soft_cap), value)


def attention_weights(
    query: Any, key: Any, mask: Any, *, scale: float, soft_cap: float | None
) -> Any:
    """Returns the attention weights of `attend`: float32 `[B, K, G, T, S]`, zero if masked."""
    b, t, n, h = ops.shape(query)
    k = ops.shape(key)[2]
    query = ops.reshape(ops.cast(query, "float32") * scale, (b, t, k, n // k, h))
    logits = ops.einsum("btkgh,bskh->bkgts", query, ops.cast(key, "float32"))
    if soft_cap is not None:
        logits = ops.tanh(logits / soft_cap) * soft_cap
    mask = ops.expand_dims(ops.expand_dims(mask, 1), 1)  # (B, 1, 1, T, S)
    if logits.shape[-1] == 1:  # Keras warns about a softmax of one number
        return ops.where(mask, ops.ones_like(logits), 0.0)
    weights = ops.softmax(ops.where(mask, logits, LOWEST), axis=-1)
    return ops.where(mask, weights, 0.0)


def weigh(weights: Any, value: Any) -> Any:
    """Sums `value [B, S, K, H]` with `weights [B, K, G, T, S]` -> `[B, T, N, H]`."""
    b, k, g, t, _ = ops.shape(weights)
    h = ops.shape(value)[3]
    dtype = keras.backend.standardize_dtype(value.dtype)
    heads = ops.einsum("bkgts,bskh->btkgh", weights, ops.cast(value, "float32"))
    return ops.cast(ops.reshape(heads, (b, t, k * g, h)), dtype)


def _capped(products: Any, soft_cap: float | None) -> Any:
    logits = ops.cast(products, "float32")
    return logits if soft_cap is None else ops.tanh(logits / soft_cap) * soft_cap


def log_sum_and_max(products: Any, soft_cap: float | None) -> tuple[Any, Any]:
    """Returns the log of the sum of exp(logit), and the largest logit, of `products [R, V]`.

    Products are logits before the soft cap. Both results are float32 `[R]`.
    """
    # Of the products themselves: XLA would write out the logits in float32 for two uses.
    largest = _capped(ops.max(products, axis=-1), soft_cap)
    differences = _capped(products, soft_cap) - ops.expand_dims(largest, -1)
    return ops.log(ops.sum(ops.exp(differences), axis=-1)) + largest, largest


def cross_entropy(products: Any, target_ids: Any, soft_cap: float | None) -> tuple[Any, Any, Any]:
    """Computes the cross entropy, in nats, of `products [..., V]`: logits before the soft cap.

    Returns losses, float32 `[...]`; hits, float32 `[...]`, 1 if the target has the largest logit;
    and the gradient of `products` in their dtype. A backend may overwrite `products` with it.
    """
    dtype = keras.backend.standardize_dtype(products.dtype)
    logits = _capped(products, soft_cap)
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


map = ops.map


def write_cache(cache: Any, new: Any, slots: Any) -> Any:
    """Returns `cache [B, R, K, H]` with `new [B, T, K, H]` written to `slots [B, T]`."""
    for i in range(slots.shape[1]):
        is_slot = ops.arange(ops.shape(cache)[1], dtype="int32")[None, :] == slots[:, i : i + 1]
        cache = ops.where(is_slot[:, :, None, None], new[:, i : i + 1], cache)
    return cache


def insert_row(array: Any, row: Any, at: Any) -> Any:
    """Returns `array [B, ...]` with `row [1, ...]` at the index `at`, an int32 scalar."""
    shape = (-1, *(1 for _ in array.shape[1:]))
    is_row = ops.reshape(ops.arange(array.shape[0], dtype="int32") == at, shape)
    return ops.where(is_row, row, array)


def while_loop(
    cond: Callable[[Any], Any], step: Callable[[Any, Any], Any]
) -> Callable[[Any, Any, int], Any]:
    """Returns the loop in Python. `cond` must be cheap, because its result is read every time."""

    def run(weights: Any, state: Any, limit: int) -> Any:
        for _ in range(limit):
            if not bool(cond(state)):
                break
            state = step(weights, state)
        return state

    return run

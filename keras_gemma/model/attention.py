"""Attention of a decoder block: who looks at whom, and at what.

A text's own keys and values serve while it is read as a whole (training, scoring, a prompt); in
decoding they come from the cache. The choice is the caller's: here they are arrays and a mask.
"""

from typing import Any

import keras
from keras import ops

from keras_gemma import backend
from keras_gemma.backend.reference import attention_weights, weigh
from keras_gemma.config import GemmaConfig
from keras_gemma.model.hooks import Taps, tapped
from keras_gemma.model.linear import Linear
from keras_gemma.model.matrix import matmul
from keras_gemma.model.rope import rotate

LARGEST_CHUNK = 512
"""Queries that look at a text at once; their logits are float32 `[B, N, 512, S]`."""


def causal_mask(attended: Any, window: int | None) -> Any:
    """Which positions of the same text each position sees -> bool `[B, T, T]`.

                   key 0 1 2 3 4
        query 0        x                    window 3: itself and the two before it
              1        x x
              2        x x x
              3          x x x
              4            x x x

    Where several documents stand in a row, whole numbers say whose each position is, as in
    `[1, 1, 1, 2, 2, 0]`, and none sees another's. Their positions go on counting: the rotary
    embedding, like the window, knows distances alone.

    Args:
        attended: bool or int `[B, T]`; False or 0 is padding, which nobody looks at.
        window: positions in sight, its own included; None for all.
    """
    positions = ops.arange(ops.shape(attended)[1], dtype="int32")
    distance = positions[:, None] - positions[None, :]
    visible = distance >= 0
    if window is not None:
        visible = ops.logical_and(visible, distance < window)
    visible = ops.logical_and(visible[None], ops.cast(attended, "bool")[:, None, :])
    if keras.backend.standardize_dtype(attended.dtype) == "bool":
        return visible
    own, seen = attended[:, :, None], attended[:, None, :]
    # What is computed at padding, nobody sees; it stays as with a mask of bools.
    return ops.logical_and(visible, ops.logical_or(ops.equal(own, seen), ops.equal(own, 0)))


def project(
    x: Any, weights: dict[str, Any], config: GemmaConfig, rotary: tuple[Any, Any]
) -> tuple[Any, Any, Any]:
    """Queries `[B, T, N, H]` and keys `[B, T, K, H]`, both rotated, and values `[B, T, K, H]`."""
    b, t = ops.shape(x)[0], ops.shape(x)[1]

    def heads(name: str, count: int) -> Any:
        return ops.reshape(matmul(x, weights[name]), (b, t, count, config.head_dim))

    query = heads("query", config.num_query_heads)
    key = heads("key", config.num_key_value_heads)
    value = heads("value", config.num_key_value_heads)
    return rotate(query, *rotary), rotate(key, *rotary), value


def attend(
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    config: GemmaConfig,
    taps: Taps,
    own: bool = False,
) -> Any:
    """`backend.attend`; in chunks of queries where they are many, for the memory of their logits.

    Where gradients are taken, those of a chunk are computed anew instead of kept.
    With a tap on the weights, which no backend shows, they are computed in plain steps.

    Args:
        own: the keys are those of the queries' own positions, so none looks past its chunk's end.
    """
    how = {"scale": config.query_scale, "soft_cap": config.attention_logit_soft_cap}
    if taps and "attention.weights" in taps:
        weights = attention_weights(query, key, mask, **how)
        b, k, g, t, s = weights.shape
        by_head = tapped(taps, "attention.weights", ops.reshape(weights, (b, k * g, t, s)))
        return weigh(ops.reshape(by_head, (b, k, g, t, s)), value)
    length = query.shape[1]
    if not isinstance(length, int) or length <= LARGEST_CHUNK:
        return backend.attend(query, key, value, mask, **how)

    def part(i: int) -> Any:
        end = i + LARGEST_CHUNK
        last = end if own else None
        seen = mask[:, i:end, :last]
        compute = keras.remat(lambda *heads: backend.attend(*heads, seen, **how))
        return compute(query[:, i:end], key[:, :last], value[:, :last])

    return ops.concatenate([part(i) for i in range(0, length, LARGEST_CHUNK)], axis=1)


def attention(
    x: Any,
    weights: dict[str, Any],
    config: GemmaConfig,
    rotary: tuple[Any, Any],
    mask: Any,
    cache: tuple[Any, Any] | None = None,
    slots: Any = None,
    taps: Taps = None,
) -> tuple[Any, tuple[Any, Any]]:
    """One attention half, before its residual.

    Args:
        x: `[B, T, D]`, normalised.
        weights: packed `query`, `key`, `value`, `output`.
        rotary: cosine and sine of `rope.rotary_angles`.
        mask: bool `[B, T, S]`.
        cache: keys and values `[B, S, K, H]` of the text so far; None to look at `x` alone.
        slots: `[B, T]`, where in the cache the positions of `x` go.
        taps: see `taps.py`.

    Returns:
        `[B, T, D]`, and the keys and values that were looked at.
    """
    query, key, value = project(x, weights, config, rotary)
    query = tapped(taps, "attention.queries", query)
    key = tapped(taps, "attention.keys", key)
    value = tapped(taps, "attention.values", value)
    if cache is not None:
        key = backend.write_cache(cache[0], key, slots)
        value = backend.write_cache(cache[1], value, slots)
    heads = attend(query, key, value, mask, config, taps, own=cache is None)
    heads = tapped(taps, "attention.heads", heads)
    b, t = ops.shape(x)[0], ops.shape(x)[1]
    heads = ops.reshape(heads, (b, t, config.num_query_heads * config.head_dim))
    return matmul(heads, weights["output"]), (key, value)


@keras.saving.register_keras_serializable(package="keras_gemma")
class GemmaAttention(keras.layers.Layer):
    """Holds the four matrices of one attention half."""

    def __init__(self, config: GemmaConfig, quantization: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        queries = config.num_query_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        how = {"quantization": quantization, "dtype": self.dtype_policy}
        self.query_dense = Linear(queries, **how, name="query")
        self.key_dense = Linear(keys, **how, name="key")
        self.value_dense = Linear(keys, **how, name="value")
        self.output_dense = Linear(config.hidden_dim, **how, name="attention_output")

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        for layer in (self.query_dense, self.key_dense, self.value_dense):
            layer.build(input_shape)
        self.output_dense.build((*input_shape[:-1], self.query_dense.out_dim))
        self.built = True

"""Attention half of a decoder block.

When a whole text is read (training, scoring, a prompt), queries attend to the keys and values of
that text. In decoding, they attend to the cache. Callers choose by passing a cache and a mask.
"""

from typing import Any

import keras
from keras import ops

from keras_gemma import backend
from keras_gemma.backend.reference import attention_weights, weigh
from keras_gemma.config import GemmaConfig
from keras_gemma.model.cache import take_slots
from keras_gemma.model.hooks import Hooks, apply_hook
from keras_gemma.model.linear import Linear
from keras_gemma.model.matrix import matmul
from keras_gemma.model.normalization import RMSNormalization, rms_normalize
from keras_gemma.model.rope import rotate
from keras_gemma.quantization import to_config

MAX_CHUNK_QUERIES = 512
"""Maximum queries per sequence that are processed at a time; logits are `[B, N, 512, S]`."""


def causal_mask(attended: Any, window: int | None) -> Any:
    """Returns the mask of attention within one text, bool `[B, T, T]`.

                   key 0 1 2 3 4
        query 0        x                    window 3: itself and the two before it
              1        x x
              2        x x x
              3          x x x
              4            x x x

    If several documents are packed into a row, `attended` numbers them, as in
    `[1, 1, 1, 2, 2, 0]`, and attention stays within each document. Positions are not reset,
    because the rotary embedding and the window depend only on distances. False or 0 in `attended
    [B, T]` is padding, which is not visible. Without a window, all earlier positions are visible.
    """
    positions = ops.arange(ops.shape(attended)[1], dtype="int32")
    distance = positions[:, None] - positions[None, :]
    visible = distance >= 0
    if window is not None:
        visible = ops.logical_and(visible, distance < window)
    visible = ops.logical_and(visible[None], ops.cast(attended, "bool")[:, None, :])
    if keras.backend.standardize_dtype(attended.dtype) == "bool":
        return visible
    own, other = attended[:, :, None], attended[:, None, :]
    # Padding queries see all documents, as with a bool mask. Their results are never used.
    return ops.logical_and(visible, ops.logical_or(ops.equal(own, other), ops.equal(own, 0)))


def project(
    x: Any, weights: dict[str, Any], config: GemmaConfig, rotary: tuple[Any, Any]
) -> tuple[Any, Any, Any]:
    """Returns rotated queries `[B, T, N, H]`, rotated keys and values, both `[B, T, K, H]`.

    Gemma 3 normalizes each head of queries and keys before the rotation.
    """
    b, t = ops.shape(x)[0], ops.shape(x)[1]

    def heads(name: str, count: int) -> Any:
        return ops.reshape(matmul(x, weights[name]), (b, t, count, config.head_dim))

    query = heads("query", config.num_query_heads)
    key = heads("key", config.num_key_value_heads)
    value = heads("value", config.num_key_value_heads)
    if config.use_query_key_norm:
        query = rms_normalize(query, weights["query_norm"], config.layer_norm_epsilon)
        key = rms_normalize(key, weights["key_norm"], config.layer_norm_epsilon)
    return rotate(query, *rotary), rotate(key, *rotary), value


def attend(
    query: Any, key: Any, value: Any, mask: Any, config: GemmaConfig, hooks: Hooks, own: bool
) -> Any:
    """Calls `backend.attend`, in chunks if there are many queries, to bound the logits' memory.

    The gradient recomputes the logits of a chunk. If `own`, queries and keys have the same
    positions, and the queries of a chunk see no keys after the chunk. A hook on the attention
    weights needs the plain implementation, because `backend.attend` does not return weights.
    """
    options = {"scale": config.query_scale, "soft_cap": config.attention_logit_soft_cap}
    if hooks and "attention.weights" in hooks:
        weights = attention_weights(query, key, mask, **options)
        b, k, g, t, s = weights.shape
        by_head = apply_hook(hooks, "attention.weights", ops.reshape(weights, (b, k * g, t, s)))
        return weigh(ops.reshape(by_head, (b, k, g, t, s)), value)
    length = query.shape[1]
    if not isinstance(length, int) or length <= MAX_CHUNK_QUERIES:
        return backend.attend(query, key, value, mask, **options)

    def chunk(i: int) -> Any:
        end = i + MAX_CHUNK_QUERIES
        last = end if own else None
        visible = mask[:, i:end, :last]
        compute = keras.remat(lambda *heads: backend.attend(*heads, visible, **options))
        return compute(query[:, i:end], key[:, :last], value[:, :last])

    return ops.concatenate([chunk(i) for i in range(0, length, MAX_CHUNK_QUERIES)], axis=1)


def attention(
    x: Any,
    weights: dict[str, Any],
    config: GemmaConfig,
    rotary: tuple[Any, Any],
    mask: Any,
    cache: tuple[Any, Any] | None = None,
    slots: Any = None,
    hooks: Hooks = None,
    first_slot: Any = None,
) -> tuple[Any, tuple[Any, Any]]:
    """Computes the attention half of a block from normalized `x [B, T, D]`, without its residual.

    `rotary` is the result of `rope.rotary_angles`, and `mask` is bool `[B, T, S]`. With a cache,
    keys and values `[B, R, K, H]` of the text so far, those of `x` are written to `slots [B, T]`.
    The mask is that of all R slots, or of the S slots from `first_slot` on, an int32 scalar.
    Returns `[B, T, D]`, and the keys and values of the text.
    """
    query, key, value = project(x, weights, config, rotary)
    query = apply_hook(hooks, "attention.queries", query)
    key = apply_hook(hooks, "attention.keys", key)
    value = apply_hook(hooks, "attention.values", value)
    if cache is not None:
        key = backend.write_cache(cache[0], key, slots)
        value = backend.write_cache(cache[1], value, slots)
    keys_and_values = key, value
    if first_slot is not None:
        key, value = (take_slots(array, first_slot, mask.shape[-1]) for array in keys_and_values)
    heads = attend(query, key, value, mask, config, hooks, own=cache is None)
    heads = apply_hook(hooks, "attention.heads", heads)
    b, t = ops.shape(x)[0], ops.shape(x)[1]
    heads = ops.reshape(heads, (b, t, config.num_query_heads * config.head_dim))
    return matmul(heads, weights["output"]), keys_and_values


@keras.saving.register_keras_serializable(package="keras_gemma")
class GemmaAttention(keras.layers.Layer):
    """Layer with the four matrices of one attention half, and the norms of queries and keys."""

    def __init__(self, config: GemmaConfig, quantization: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        queries = config.num_query_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        quantization = to_config(quantization)

        def linear(kind: str, out_dim: int, name: str) -> Linear:
            options = {"dtype": self.dtype_policy, "name": name}
            return Linear(out_dim, quantization and quantization.within(kind), **options)

        self.query_dense = linear("query", queries, "query")
        self.key_dense = linear("key", keys, "key")
        self.value_dense = linear("value", keys, "value")
        if config.use_query_key_norm:
            epsilon, dtype = config.layer_norm_epsilon, self.dtype_policy
            self.query_norm = RMSNormalization(epsilon, dtype=dtype, name="query_norm")
            self.key_norm = RMSNormalization(epsilon, dtype=dtype, name="key_norm")
        self.head_dim = config.head_dim
        self.output_dense = linear("output", config.hidden_dim, "attention_output")

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        for layer in (self.query_dense, self.key_dense, self.value_dense):
            layer.build(input_shape)
        for norm in (getattr(self, "query_norm", None), getattr(self, "key_norm", None)):
            if norm is not None:
                norm.build((*input_shape[:-1], self.head_dim))
        self.output_dense.build((*input_shape[:-1], self.query_dense.out_dim))
        self.built = True

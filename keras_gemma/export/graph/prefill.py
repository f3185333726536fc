"""Texts into the model, in a TensorFlow graph: as many and as long as come.

The functions are the model's own (`generation/`, `model/`); here are the loops around them, over
shapes that nobody knows before the graph runs. Knows no strings.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from keras_gemma import backend
from keras_gemma.config import GemmaConfig
from keras_gemma.generation.buckets import MAX_CHUNK_TOKENS, MIN_CACHE_SLOTS, bucket
from keras_gemma.model.block import decoder_block
from keras_gemma.model.cache import Cache
from keras_gemma.model.head import head
from keras_gemma.model.transformer import BlockFunctions, forward_with_cache


class Model(NamedTuple):
    """What a graph needs of a backbone."""

    config: GemmaConfig
    dtype: str
    """Of activations."""
    parts: BlockFunctions
    """Its functions, each traced once for all layers: in a plain graph,"""
    fused: BlockFunctions
    """and by XLA."""


def model_of(config: GemmaConfig, dtype: str) -> Model:
    """The functions of a model of `config`."""
    fused = BlockFunctions(backend.jit_part(decoder_block), backend.jit_part(head))
    return Model(config, dtype, BlockFunctions(backend.compile(decoder_block), fused.head), fused)


def capacity_for(length: tf.Tensor, config: GemmaConfig) -> tf.Tensor:
    """The smallest capacity of a cache for texts of `length` tokens, as in `buckets.py`."""
    sizes, largest = [MIN_CACHE_SLOTS], bucket(config.context_length, MIN_CACHE_SLOTS)
    while sizes[-1] < largest:
        sizes.append(2 * sizes[-1])
    sizes = tf.constant(sizes)
    return tf.reduce_min(tf.where(sizes >= length, sizes, largest))


def read(
    weights: dict[str, Any],
    token_ids: tf.Tensor,
    model: Model,
    capacity: tf.Tensor,
    first: Any,
    look: Callable[[tf.Tensor, tf.Tensor, Any], Any],
    positions_at_once: int = MAX_CHUNK_TOKENS,
) -> tuple[Any, Cache]:
    """Read texts from their beginnings, a chunk of positions at a time.

    Args:
        token_ids: int32 `[B, T]`, padded at their ends.
        capacity: slots of the cache, int32, at least T.
        first: what is known before the first chunk, tensors.
        look: `(x [B, t, D], start, known) -> known`, called with what the last block says of each
            chunk.
        positions_at_once: of all rows together.

    Returns:
        What is known after the last chunk, and the cache by position.
    """
    config = model.config
    batch, length = tf.shape(token_ids)[0], tf.shape(token_ids)[1]
    size = tf.maximum(1, positions_at_once // batch)
    slots = (config.num_key_value_heads, config.head_dim)
    empty = tf.zeros((batch, capacity, *slots), model.dtype)
    cache = [(empty, empty) for _ in range(config.num_layers)]

    def chunk(start: tf.Tensor, known: Any, cache: Cache) -> Any:
        ids = token_ids[:, start : start + size]
        positions = tf.range(start, start + tf.shape(ids)[1])[None] + tf.zeros((batch, 1), tf.int32)
        x, cache = forward_with_cache(weights, ids, positions, cache, config, model.parts)
        known = look(x, start, known)
        return start + size, known, cache

    _, known, cache = tf.while_loop(
        lambda start, *_: start < length,
        chunk,
        (0, first, cache),
        shape_invariants=(
            tf.TensorShape([]),
            tf.nest.map_structure(lambda array: array.shape, first),
            [(tf.TensorShape([None, None, *slots]),) * 2 for _ in cache],
        ),
    )
    return known, cache


def last_of_each(
    lengths: tf.Tensor,
) -> Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor]:
    """A `look` that keeps what is said of each row's last token, `[B, D]`."""

    def look(x: tf.Tensor, start: tf.Tensor, hidden: tf.Tensor) -> tf.Tensor:
        last, t = lengths - 1 - start, tf.shape(x)[1]
        at = tf.gather(x, tf.clip_by_value(last, 0, t - 1), axis=1, batch_dims=1)
        here = tf.logical_and(last >= 0, last < t)[:, None]
        return tf.where(here, at, hidden)

    return look

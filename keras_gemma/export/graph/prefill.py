"""Prefill in a TensorFlow graph, for any number and length of prompts.

The functions are the model's own (`generation/`, `model/`). This module adds loops over shapes
that are known only when the graph runs. Knows nothing about strings.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from keras_gemma import backend
from keras_gemma.buckets import bucket
from keras_gemma.config import GemmaConfig
from keras_gemma.generation.prefill import MAX_CHUNK_TOKENS, MIN_CACHE_SLOTS
from keras_gemma.model.block import decoder_block
from keras_gemma.model.cache import Cache
from keras_gemma.model.head import head
from keras_gemma.model.transformer import BlockFunctions, forward_with_cache


class Model(NamedTuple):
    """Functions of a backbone for a graph, each traced once for all layers."""

    config: GemmaConfig
    dtype: str  # of activations
    prefill_functions: BlockFunctions  # the block is a plain graph
    decode_functions: BlockFunctions  # compiled by XLA


def model_of(config: GemmaConfig, dtype: str) -> Model:
    compiled = BlockFunctions(backend.jit_part(decoder_block), backend.jit_part(head))
    prefill_functions = BlockFunctions(backend.compile(decoder_block), compiled.head)
    return Model(config, dtype, prefill_functions, compiled)


def capacity_for(length: tf.Tensor, config: GemmaConfig) -> tf.Tensor:
    """Returns the capacity of a cache for `length` tokens, as in `generation/prefill.py`."""
    sizes, largest = [MIN_CACHE_SLOTS], bucket(config.context_length, MIN_CACHE_SLOTS)
    while sizes[-1] < largest:
        sizes.append(2 * sizes[-1])
    sizes = tf.constant(sizes)
    return tf.reduce_min(tf.where(sizes >= length, sizes, largest))


def prefill(
    weights: dict[str, Any],
    token_ids: tf.Tensor,
    model: Model,
    capacity: tf.Tensor,
    initial: Any,
    on_chunk: Callable[[tf.Tensor, tf.Tensor, Any], Any],
    chunk_positions: int = MAX_CHUNK_TOKENS,
) -> tuple[Any, Cache]:
    """Processes sequences from their start, in chunks of at most `chunk_positions` tokens.

    Args:
        weights: Weights of the backbone.
        token_ids: int32 `[B, T]`, padded at the end.
        model: Functions of the model.
        capacity: Slots of the cache, int32, at least T.
        initial: `result` for the first chunk.
        on_chunk: `(x [B, t, D], start, result) -> result`, called with the output of the last block
            for each chunk.
        chunk_positions: Maximum positions of a chunk, of all sequences together.

    Returns:
        The last `result`, and the cache by position.
    """
    config = model.config
    batch, length = tf.shape(token_ids)[0], tf.shape(token_ids)[1]
    size = tf.maximum(1, chunk_positions // batch)
    slots = (config.num_key_value_heads, config.head_dim)
    empty = tf.zeros((batch, capacity, *slots), model.dtype)
    cache = [(empty, empty) for _ in range(config.num_layers)]

    def process_chunk(start: tf.Tensor, result: Any, cache: Cache) -> Any:
        ids = token_ids[:, start : start + size]
        positions = tf.range(start, start + tf.shape(ids)[1])[None] + tf.zeros((batch, 1), tf.int32)
        x, cache = forward_with_cache(
            weights, ids, positions, cache, config, model.prefill_functions
        )
        return start + size, on_chunk(x, start, result), cache

    _, result, cache = tf.while_loop(
        lambda start, *_: start < length,
        process_chunk,
        (0, initial, cache),
        shape_invariants=(
            tf.TensorShape([]),
            tf.nest.map_structure(lambda array: array.shape, initial),
            [(tf.TensorShape([None, None, *slots]),) * 2 for _ in cache],
        ),
    )
    return result, cache


def last_hidden(lengths: tf.Tensor) -> Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor]:
    """Returns an `on_chunk` whose result is the output for each last token, `[B, D]`."""

    def on_chunk(x: tf.Tensor, start: tf.Tensor, hidden: tf.Tensor) -> tf.Tensor:
        last, t = lengths - 1 - start, tf.shape(x)[1]
        output = tf.gather(x, tf.clip_by_value(last, 0, t - 1), axis=1, batch_dims=1)
        in_chunk = tf.logical_and(last >= 0, last < t)[:, None]
        return tf.where(in_chunk, output, hidden)

    return on_chunk

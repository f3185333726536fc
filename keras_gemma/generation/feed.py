"""Tokens into the model: the one function that prompts, decoding and verification read with.

Each row's tokens stand at positions of their own; what came before them is in the cache.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_gemma import backend
from keras_gemma.config import GemmaConfig
from keras_gemma.model.cache import Cache, cache_mask, slot_of
from keras_gemma.model.decoder_block import decoder_block
from keras_gemma.model.embedding import scale_embeddings
from keras_gemma.model.head import head
from keras_gemma.model.rope import rotary_angles


class Parts(NamedTuple):
    """The functions that a step calls, as they are or compiled apart (`backend.jit_part`)."""

    block: Callable[..., Any] = decoder_block
    head: Callable[..., Any] = head


AS_THEY_ARE = Parts()


def feed(
    weights: dict[str, Any],
    token_ids: Any,
    positions: Any,
    cache: Cache,
    config: GemmaConfig,
    parts: Parts = AS_THEY_ARE,
) -> tuple[Any, Cache]:
    """Read tokens that follow what is in the cache.

    Args:
        weights: `GemmaBackbone.tensors()`.
        token_ids: int32 `[B, T]`.
        positions: int32 `[B, T]`, one after the other in each row.
        cache: of the text before them.

    Returns:
        What the last block says of each, `[B, T, D]`, and the cache with them in it.
    """
    dtype = keras.backend.standardize_dtype(cache[0][0].dtype)  # norms may be kept in another
    x = backend.embed(token_ids, weights["head"]["token_embedding"], dtype)
    x = scale_embeddings(x, config.embedding_scale)
    rotary = rotary_angles(positions, config.head_dim)
    seen = {}  # masks and slots, which layers share
    after = []
    for layer, kept in enumerate(cache):
        window, slots = config.window(layer), ops.shape(kept[0])[1]
        kind = kept[0].shape[1], window
        if kind not in seen:
            seen[kind] = cache_mask(slots, positions, window), slot_of(positions, slots)
        mask, slots = seen[kind]
        x, kept = parts.block(x, weights["layers"][layer], config, rotary, mask, kept, slots)
        after.append(kept)
    return x, after

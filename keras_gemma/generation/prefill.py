"""The prompt, read as a whole: its keys and values for the cache, and its last hidden state."""

from typing import Any

from keras import ops

from keras_gemma import backend
from keras_gemma.config import GemmaConfig
from keras_gemma.model.attention import causal_mask
from keras_gemma.model.cache import fill_ring, slots_of_layers
from keras_gemma.model.decoder_block import decoder_block
from keras_gemma.model.embedding import scale_embeddings
from keras_gemma.model.rope import rotary_angles


def prefill(
    weights: dict[str, Any],
    token_ids: Any,
    lengths: Any,
    *,
    config: GemmaConfig,
    capacity: int,
) -> tuple[Any, list[tuple[Any, Any]]]:
    """Read prompts of different lengths, padded at their ends.

    Padding stands behind every true position, where the causal mask hides it, and beyond the
    row's length, where decoding writes over it: it needs no mask of its own.

    Args:
        weights: `GemmaBackbone.tensors()`.
        token_ids: int32 `[B, T]`.
        lengths: int32 `[B]`, at least 1.
        capacity: S, the tokens that each row's text may grow to.

    Returns:
        What the last block says of each row's last token, `[B, D]`, and the cache.
    """
    x = backend.embed(token_ids, weights["head"]["token_embedding"])
    x = scale_embeddings(x, config.embedding_scale)
    positions = ops.arange(ops.shape(token_ids)[1], dtype="int32")[None]
    rotary = rotary_angles(positions, config.head_dim)
    everything = ops.ones_like(token_ids, dtype="bool")
    masks = {
        window: causal_mask(everything, window)
        for window in {config.window(layer) for layer in range(config.num_layers)}
    }
    cache = []
    for layer, slots in enumerate(slots_of_layers(config, capacity)):
        mask = masks[config.window(layer)]
        x, looked_at = decoder_block(x, weights["layers"][layer], config, rotary, mask)
        cache.append(tuple(fill_ring(fresh, slots, lengths) for fresh in looked_at))
    # Only the last token goes on to the head, the widest product of all.
    x = ops.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return x, cache

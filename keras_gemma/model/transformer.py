"""The forward pass: embeddings, then every block in order.

Everything that reads tokens calls `run_blocks`: the Keras graph, calibration, prefill, decoding,
verification of draft tokens, scoring with hooks, and exports. The callers differ in their masks and
caches. Knows nothing about frameworks and sampling.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_gemma import backend
from keras_gemma.config import GemmaConfig, LayerKind
from keras_gemma.model.attention import causal_mask
from keras_gemma.model.block import decoder_block
from keras_gemma.model.cache import Cache, cache_mask, slot_of, visible_slots, window_slots
from keras_gemma.model.embedding import scale_embeddings
from keras_gemma.model.head import final_norm, head
from keras_gemma.model.hooks import Hooks, apply_hook
from keras_gemma.model.rope import rotary_angles


class BlockFunctions(NamedTuple):
    """Functions of a decode step, plain or compiled separately by `backend.jit_part`."""

    block: Callable[..., Any] = decoder_block
    head: Callable[..., Any] = head


EAGER = BlockFunctions()


def embed_tokens(
    weights: dict[str, Any], token_ids: Any, config: GemmaConfig, dtype: str, hooks: Hooks = None
) -> Any:
    """Returns the scaled embeddings of `token_ids [B, T]` in `dtype`: `[B, T, D]`."""
    x = backend.embed(token_ids, weights["head"]["token_embedding"], dtype)
    return scale_embeddings(apply_hook(hooks, "embeddings", x), config.embedding_scale)


def run_blocks(
    x: Any,
    layers: list[dict[str, Any]],
    config: GemmaConfig,
    positions: Any,
    mask_of: Callable[[LayerKind, Any], Any],
    cache: Cache | None = None,
    slots_of: Callable[[Any], Any] | None = None,
    *,
    first_slot_of: Callable[[LayerKind, Any], Any] | None = None,
    first: int = 0,
    hooks: Hooks = None,
    block: Callable[..., Any] = decoder_block,
) -> tuple[Any, Cache]:
    """Runs blocks in order. Masks, cache slots and rotary angles are computed once per layer kind.

    Args:
        x: Residual stream, `[B, T, D]`.
        layers: Packed weights of each block, from index `first` of the model on.
        positions: Int32 `[B, T]`.
        mask_of: `(kind, R)` -> bool `[B, T, S]`. The cache size R is `None` without a cache.
        cache: Keys and values of earlier tokens. Layers of one kind have equally many slots.
        slots_of: `R` -> int32 `[B, T]`, the cache slot of each token. Required with `cache`.
        first_slot_of: `(kind, R)` -> int32 scalar, the cache slot of the first key of the mask, or
            `None` if the mask is that of all slots.
        hooks: Functions by hook point, such as `"block.0.residual.after"`.

    Returns:
        Output of the last block `[B, T, D]`, and the keys and values of each block.
    """
    angles: dict[Any, Any] = {}
    shared: dict[LayerKind, tuple[Any, Any, Any]] = {}
    new_cache = []
    for i, weights in enumerate(layers):
        kind = config.layer_kind(first + i)
        rope = kind.rope_theta, kind.rope_scaling
        if rope not in angles:
            angles[rope] = rotary_angles(positions, config.head_dim, *rope)
        keys_and_values = None if cache is None else cache[i]
        if kind not in shared:
            size = None if keys_and_values is None else ops.shape(keys_and_values[0])[1]
            shared[kind] = (
                mask_of(kind, size),
                slots_of and slots_of(size),
                first_slot_of and first_slot_of(kind, size),
            )
        mask, slots, first_slot = shared[kind]
        prefix = f"block.{first + i}."
        names = [name for name in hooks or () if name.startswith(prefix)]
        options = {"hooks": {n.removeprefix(prefix): hooks[n] for n in names}} if names else {}
        if first_slot is not None:
            options["first_slot"] = first_slot
        x, keys_and_values = block(
            x, weights, config, angles[rope], mask, keys_and_values, slots, **options
        )
        new_cache.append(keys_and_values)
    return x, new_cache


def forward_with_cache(
    weights: dict[str, Any],
    token_ids: Any,
    positions: Any,
    cache: Cache,
    config: GemmaConfig,
    functions: BlockFunctions = EAGER,
    start: Any = None,
) -> tuple[Any, Cache]:
    """Reads tokens `[B, T]` that follow the cached ones, at consecutive `positions [B, T]`.

    If all rows have the same positions, and all layers a cache by position, `start` is the first of
    these, an int32 scalar. Local layers then read only the slots of their window.

    Returns the output of the last block `[B, T, D]`, before the final norm, and the updated cache.
    """
    length = token_ids.shape[1]

    def count_of(kind: LayerKind, slots: Any) -> int | None:
        return None if start is None else window_slots(slots, length, kind.window)

    def first_slot_of(kind: LayerKind, slots: Any) -> Any:
        count = count_of(kind, slots)
        if count is None:
            return None
        first = ops.convert_to_tensor(start, dtype="int32") + (length - count)
        return ops.clip(first, 0, slots - count)

    def mask_of(kind: LayerKind, slots: Any) -> Any:
        count = count_of(kind, slots)
        if count is None:
            return cache_mask(slots, positions, kind.window)
        stored = first_slot_of(kind, slots) + ops.arange(count, dtype="int32")
        return visible_slots(stored[None, None], positions[:, :, None], kind.window)

    dtype = keras.backend.standardize_dtype(cache[0][0].dtype)  # norms may have another dtype
    return run_blocks(
        embed_tokens(weights, token_ids, config, dtype),
        weights["layers"],
        config,
        positions,
        mask_of,
        cache,
        lambda slots: slot_of(positions, slots),
        first_slot_of=first_slot_of,
        block=functions.block,
    )


def hidden_states(
    weights: dict[str, Any],
    token_ids: Any,
    attended: Any,
    config: GemmaConfig,
    dtype: str,
    hooks: Hooks = None,
) -> Any:
    """Returns the input of the head for whole texts `[B, T]`: `[B, T, D]`, after the final norm.

    `attended`, bool `[B, T]`, is False at padding on either side. Positions count from the first
    True token of a text.
    """
    first = ops.argmax(ops.cast(attended, "int32"), axis=1)
    positions = ops.arange(token_ids.shape[1], dtype="int32")[None]
    positions = ops.clip(positions - ops.cast(first, "int32")[:, None], 0, token_ids.shape[1])
    x, _ = run_blocks(
        embed_tokens(weights, token_ids, config, dtype, hooks),
        weights["layers"],
        config,
        positions,
        lambda kind, slots: causal_mask(attended, kind.window),
        hooks=hooks,
    )
    x = final_norm(x, weights["head"], config)
    return apply_hook(hooks, "final_norm", x)

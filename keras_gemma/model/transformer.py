"""The forward pass: embeddings, then every block in order.

Everything that reads tokens calls `run_blocks`: the Keras graph, calibration, prefill, decoding,
verification of draft tokens, scoring with hooks, and exports. The callers differ in their masks and
caches. Knows nothing about frameworks and sampling.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_gemma import backend
from keras_gemma.config import GemmaConfig, LayerKind
from keras_gemma.model.attention import causal_mask
from keras_gemma.model.block import decoder_block
from keras_gemma.model.cache import Cache, cache_mask, slot_of
from keras_gemma.model.embedding import scale_embeddings
from keras_gemma.model.head import head
from keras_gemma.model.hooks import Hooks, apply_hook
from keras_gemma.model.normalization import rms_normalize
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
    first: int = 0,
    hooks: Hooks = None,
    block: Callable[..., Any] = decoder_block,
) -> tuple[Any, Cache]:
    """Runs blocks in order. Masks, cache slots and rotary angles are computed once per layer kind.

    Args:
        x: Residual stream, `[B, T, D]`.
        layers: Packed weights of each block, as in `GemmaBackbone.tensors()["layers"]`.
        config: Configuration of the model.
        positions: Int32 `[B, T]`.
        mask_of: `(kind, slots)` -> bool `[B, T, S]`. `slots` is the cache size R of the layer, or
            `None` without a cache.
        cache: Keys and values of earlier tokens, one pair per block. Layers of one kind have the
            same number of slots.
        slots_of: `slots` -> int32 `[B, T]`, the cache slot of each token. Required with `cache`.
        first: Index of the first of `layers` in the model.
        hooks: Functions by hook point, such as `"block.0.residual.after"`.
        block: Function that computes one block.

    Returns:
        Output of the last block `[B, T, D]`, and the keys and values of each block.
    """
    angles: dict[Any, Any] = {}
    shared: dict[LayerKind, tuple[Any, Any]] = {}
    new_cache = []
    for i, weights in enumerate(layers):
        kind = config.layer_kind(first + i)
        rope = kind.rope_theta, kind.rope_scaling
        if rope not in angles:
            angles[rope] = rotary_angles(positions, config.head_dim, *rope)
        keys_and_values = None if cache is None else cache[i]
        if kind not in shared:
            slots = None if keys_and_values is None else ops.shape(keys_and_values[0])[1]
            shared[kind] = mask_of(kind, slots), slots_of and slots_of(slots)
        mask, slots = shared[kind]
        block_hooks = _hooks_of_block(hooks, first + i)
        options = {"hooks": block_hooks} if block_hooks else {}
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
) -> tuple[Any, Cache]:
    """Reads tokens that follow the cached ones.

    Args:
        weights: `GemmaBackbone.tensors()`.
        token_ids: Int32 `[B, T]`.
        positions: Int32 `[B, T]`, consecutive in each row.
        cache: Keys and values of the earlier tokens.
        config: Configuration of the model.
        functions: Functions that compute the blocks.

    Returns:
        Output of the last block `[B, T, D]`, before the final norm, and the updated cache.
    """
    dtype = keras.backend.standardize_dtype(cache[0][0].dtype)  # norms may have another dtype
    return run_blocks(
        embed_tokens(weights, token_ids, config, dtype),
        weights["layers"],
        config,
        positions,
        lambda kind, slots: cache_mask(slots, positions, kind.window),
        cache,
        lambda slots: slot_of(positions, slots),
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
    """Returns the input of the head for whole texts: `[B, T, D]`, after the final norm.

    Args:
        weights: `GemmaBackbone.tensors()`.
        token_ids: Int32 `[B, T]`.
        attended: Bool `[B, T]`, False at padding on either side. The positions of a text count
            from its first True token.
        config: Configuration of the model.
        dtype: Dtype of the activations.
        hooks: Functions by hook point.
    """
    first = ops.argmax(ops.cast(attended, "int32"), axis=1)
    positions = ops.arange(token_ids.shape[1], dtype="int32")[None]
    positions = ops.maximum(positions - ops.cast(first, "int32")[:, None], 0)
    x, _ = run_blocks(
        embed_tokens(weights, token_ids, config, dtype, hooks),
        weights["layers"],
        config,
        positions,
        lambda kind, slots: causal_mask(attended, kind.window),
        hooks=hooks,
    )
    x = rms_normalize(x, weights["head"]["final_norm"], config.layer_norm_epsilon)
    return apply_hook(hooks, "final_norm", x)


def _hooks_of_block(hooks: Hooks, layer: int) -> Mapping[str, Any] | None:
    prefix = f"block.{layer}."
    return {
        name.removeprefix(prefix): hook
        for name, hook in (hooks or {}).items()
        if name.startswith(prefix)
    } or None

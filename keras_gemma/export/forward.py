"""Function that an exported program computes: tokens and a KV cache to logits and a longer cache.

The formats torch, jax and onnx all hold this function. The cache of every layer, local or global,
keeps all positions: position p is in slot p. So a runtime only passes the cache on, sequences may
have any lengths, and a cache serves texts up to its own length.

    prefill   token_ids [B, T]  prompts, padded at the end   start 0        last length - 1
    step      token_ids [B, 1]  the tokens chosen last       start length   last 0

Knows nothing about formats and files.
"""

from typing import Any

import keras
from keras import ops

from keras_gemma import backend
from keras_gemma.config import GemmaConfig, LayerKind
from keras_gemma.model.head import head
from keras_gemma.model.transformer import embed_tokens, run_blocks


def forward(
    arrays: dict[str, Any],
    config: GemmaConfig,
    token_ids: Any,
    start: Any,
    last: Any,
    cache: list[Any],
) -> tuple[Any, list[Any]]:
    """Returns the logits after the last token of each sequence, and the updated cache.

    Padding may hold any ids: positions after the end of a sequence are masked, and overwritten
    when the sequence reaches them.

    Args:
        arrays: Result of `named_arrays`.
        config: Config of the model.
        token_ids: int32 `[B, T]`, the tokens that follow those in the cache.
        start: int32 `[B]`, position of the first token of each sequence.
        last: int32 `[B]`, index in T of the last token of each sequence.
        cache: Keys and values of each layer in turn, `[B, S, K, H]` each.
    """
    layers, head_weights = unflatten(arrays, config.num_layers)
    t, s = token_ids.shape[1], cache[0].shape[1]
    indices = ops.arange(t, dtype="int32")[None]
    positions = start[:, None] + indices
    distance = positions[:, :, None] - ops.arange(s, dtype="int32")[None, None]
    causal = distance >= 0  # (B, T, S)

    def mask_of(kind: LayerKind, slots: Any) -> Any:
        return causal if kind.window is None else ops.logical_and(causal, distance < kind.window)

    dtype = keras.backend.standardize_dtype(head_weights["final_norm"].dtype)
    x, new_cache = run_blocks(
        embed_tokens({"head": head_weights}, token_ids, config, dtype),
        layers,
        config,
        positions,
        mask_of,
        list(zip(cache[::2], cache[1::2], strict=True)),
        lambda slots: positions,
    )
    is_last = indices == last[:, None]
    x = ops.sum(ops.where(is_last[..., None], x, 0), axis=1)  # all other summands are zero
    return head(x, head_weights, config), [array for pair in new_cache for array in pair]


def named_arrays(backbone: Any) -> dict[str, Any]:
    """Returns the packed weights of a `GemmaBackbone` by name, such as `layers.0.query`.

    The arrays of a quantized matrix end in `.values`, `.scales`, `.zeros` and `.minimums`.
    """
    weights = backbone.tensors()
    named = dict(weights["head"])
    for i, layer in enumerate(weights["layers"]):
        named |= {f"layers.{i}.{part}": weight for part, weight in layer.items()}
    arrays = {}
    for name, weight in named.items():
        if isinstance(weight, backend.Quantized):
            arrays |= {f"{name}.{part}": array for part, array in weight.by_file_name().items()}
        else:
            arrays[name] = weight
    return arrays


def unflatten(
    arrays: dict[str, Any], num_layers: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Returns the weights of each layer, and of the head. Inverse of `named_arrays`."""
    layers: list[dict[str, Any]] = [{} for _ in range(num_layers)]
    head_weights: dict[str, Any] = {}
    for name, array in arrays.items():
        weights, path = head_weights, name.split(".")
        if path[0] == "layers":
            weights, path = layers[int(path[1])], path[2:]
        if len(path) == 1:
            weights[path[0]] = array
        else:  # a part of a quantized matrix
            matrix = weights.get(path[0], backend.Quantized(None, None))
            weights[path[0]] = matrix.from_file_names(matrix.by_file_name() | {path[1]: array})
    return layers, head_weights

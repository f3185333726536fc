"""What an exported program computes: tokens in, logits and a longer cache out.

The formats torch, jax and onnx all hold this function. It reads with caches that keep every
position, local layers too: position p lies in slot p. So a runtime needs no rule but to pass on
what it was given, rows may have any lengths, and a cache serves texts up to its own length.

    prefill   token_ids [B, T]  the prompts, padded at their ends   start 0      last length - 1
    step      token_ids [B, 1]  the tokens chosen last              start length last 0

Knows no format and no file.
"""

from typing import Any

import keras
from keras import ops

from keras_gemma import backend
from keras_gemma.config import GemmaConfig, LayerKind
from keras_gemma.model.head import head
from keras_gemma.model.transformer import embed_tokens, run_blocks


def read(
    arrays: dict[str, Any],
    config: GemmaConfig,
    token_ids: Any,
    start: Any,
    last: Any,
    cache: list[Any],
) -> tuple[Any, list[Any]]:
    """Read tokens that follow what is in the cache.

    Padding may hold any ids: what stands behind a row's text is hidden from it, and is written
    over when the text gets there.

    Args:
        arrays: of `named_arrays`.
        config: of the model.
        token_ids: int32 `[B, T]`.
        start: int32 `[B]`, the position of each row's first token.
        last: int32 `[B]`, which of its T tokens is the last of each row's text.
        cache: keys and values of each layer in turn, `[B, S, K, H]` each.

    Returns:
        float32 `[B, V]`, the logits of what follows each row's last token; and the cache.
    """
    layers, ends = nested(arrays, config.num_layers)
    t, s = token_ids.shape[1], cache[0].shape[1]
    places = ops.arange(t, dtype="int32")[None]
    positions = start[:, None] + places
    distance = positions[:, :, None] - ops.arange(s, dtype="int32")[None, None]
    before = distance >= 0  # (B, T, S)

    def mask_of(kind: LayerKind, slots: Any) -> Any:
        return before if kind.window is None else ops.logical_and(before, distance < kind.window)

    dtype = keras.backend.standardize_dtype(ends["final_norm"].dtype)
    x, after = run_blocks(
        embed_tokens({"head": ends}, token_ids, config, dtype),
        layers,
        config,
        positions,
        mask_of,
        list(zip(cache[::2], cache[1::2], strict=True)),
        lambda slots: positions,
    )
    here = places == last[:, None]
    x = ops.sum(ops.where(here[..., None], x, 0), axis=1)  # a sum of one and of zeros
    return head(x, ends, config), [array for pair in after for array in pair]


def named_arrays(backbone: Any) -> dict[str, Any]:
    """The packed weights of a `GemmaBackbone` by name, such as `layers.0.query`.

    Those of a quantized matrix end in `.values`, `.scales` and `.zeros`.
    """
    weights = backbone.tensors()
    named = dict(weights["head"])
    for i, layer in enumerate(weights["layers"]):
        named |= {f"layers.{i}.{part}": weight for part, weight in layer.items()}
    arrays = {}
    for name, weight in named.items():
        if isinstance(weight, backend.Quantized):
            parts = weight.by_file_name().items()
            arrays |= {f"{name}.{part}": array for part, array in parts}
        else:
            arrays[name] = weight
    return arrays


def nested(arrays: dict[str, Any], num_layers: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What `named_arrays` gave -> the weights of each layer, and those at both ends."""
    layers: list[dict[str, Any]] = [{} for _ in range(num_layers)]
    ends: dict[str, Any] = {}
    for name, array in arrays.items():
        place, names = ends, name.split(".")
        if names[0] == "layers":
            place, names = layers[int(names[1])], names[2:]
        if len(names) == 1:
            place[names[0]] = array
        else:  # one of the parts of a quantized matrix
            known = place.get(names[0], backend.Quantized(None, None))
            place[names[0]] = known.from_file_names(known.by_file_name() | {names[1]: array})
    return layers, ends

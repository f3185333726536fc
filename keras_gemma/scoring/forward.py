"""From ids to what the head reads, with a look at every place on the way.

Runs as it is, where Python looks on, or as a part of a compiled program.
"""

from collections.abc import Mapping
from typing import Any

from keras import ops, tree

from keras_gemma import backend
from keras_gemma.config import GemmaConfig
from keras_gemma.model.attention import causal_mask
from keras_gemma.model.backbone import GemmaBackbone
from keras_gemma.model.decoder_block import decoder_block
from keras_gemma.model.embedding import scale_embeddings
from keras_gemma.model.head import to_logits
from keras_gemma.model.hooks import Taps, tapped
from keras_gemma.model.normalization import rms_normalize
from keras_gemma.model.rope import rotary_angles


def constant_weights(backbone: GemmaBackbone) -> dict[str, Any]:
    """All packed weights, by which no gradient passes: those of activations are asked for here.

    So a gradient keeps no activations for the sake of weights, and computes none of theirs.
    """
    return tree.map_structure(
        lambda x: None if x is None else ops.stop_gradient(x), backbone.tensors()
    )


def forward(
    weights: dict[str, Any],
    token_ids: Any,
    attended: Any,
    config: GemmaConfig,
    dtype: str,
    taps: Taps = None,
) -> Any:
    """What the head reads: the last block's output, normalised, `[B, T, D]`.

    Args:
        weights: `constant_weights`, or `GemmaBackbone.tensors()`.
        token_ids: int32 `[B, T]`.
        attended: bool `[B, T]`, false at padding, at whichever end; a text's positions count from
            its first true token.
        dtype: of the activations.
        taps: by the names of `hooks.py`.
    """
    x = backend.embed(token_ids, weights["head"]["token_embedding"], dtype)
    x = scale_embeddings(tapped(taps, "embeddings", x), config.embedding_scale)
    first = ops.argmax(ops.cast(attended, "int32"), axis=1)
    positions = ops.arange(token_ids.shape[1], dtype="int32")[None]
    positions = ops.maximum(positions - ops.cast(first, "int32")[:, None], 0)
    rotary = rotary_angles(positions, config.head_dim)
    windows = {config.window(layer) for layer in range(config.num_layers)}
    masks = {window: causal_mask(attended, window) for window in windows}
    for layer, block in enumerate(weights["layers"]):
        mask = masks[config.window(layer)]
        x, _ = decoder_block(x, block, config, rotary, mask, taps=_of_block(taps, layer))
    x = rms_normalize(x, weights["head"]["final_norm"], config.layer_norm_epsilon)
    return tapped(taps, "final_norm", x)


def logits_of(x: Any, weights: dict[str, Any], config: GemmaConfig, taps: Taps = None) -> Any:
    """What the head says of `x [..., D]`, normalised: float32 `[..., V]`, capped."""
    logits = to_logits(x, weights["head"]["token_embedding"], config.final_logit_soft_cap)
    return tapped(taps, "logits", logits)


def _of_block(taps: Taps, layer: int) -> Mapping[str, Any] | None:
    prefix = f"block.{layer}."
    here = {name: tap for name, tap in (taps or {}).items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): tap for name, tap in here.items()} or None

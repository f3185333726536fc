"""One decoder block as a function: attention and feed forward on the residual stream."""

from collections.abc import Callable
from typing import Any

from keras_gemma.config import GemmaConfig
from keras_gemma.model.attention import attention
from keras_gemma.model.feed_forward import feed_forward
from keras_gemma.model.hooks import Taps, tapped
from keras_gemma.model.normalization import rms_normalize


def decoder_block(
    x: Any,
    weights: dict[str, Any],
    config: GemmaConfig,
    rotary: tuple[Any, Any],
    mask: Any,
    cache: tuple[Any, Any] | None = None,
    slots: Any = None,
    dropout: Callable[[Any], Any] = lambda x: x,
    taps: Taps = None,
) -> tuple[Any, tuple[Any, Any]]:
    """One block. Gemma 2 normalises the end of each half too, where the weights hold such a norm.

    Args:
        x: `[B, T, D]`, the residual.
        weights: this block's, named as in `GemmaConfig.weight_shapes`.
        dropout: applied to what each half adds; see `attention` for the rest.
        taps: by the names of `taps.BLOCK_PLACES`.

    Returns:
        `[B, T, D]`, and the keys and values that were looked at.
    """

    def normalize(x: Any, name: str) -> Any:
        return rms_normalize(x, weights[name], config.layer_norm_epsilon)

    x = tapped(taps, "residual.before", x)
    half, looked_at = attention(
        normalize(x, "pre_attention_norm"), weights, config, rotary, mask, cache, slots, taps
    )
    if "post_attention_norm" in weights:
        half = normalize(half, "post_attention_norm")
    x = x + dropout(tapped(taps, "attention.output", half))
    x = tapped(taps, "residual.middle", x)

    half = feed_forward(
        normalize(x, "pre_ffw_norm"), weights["gate"], weights["up"], weights["down"], taps
    )
    if "post_ffw_norm" in weights:
        half = normalize(half, "post_ffw_norm")
    x = x + dropout(tapped(taps, "feed_forward.output", half))
    return tapped(taps, "residual.after", x), looked_at

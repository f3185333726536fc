"""One decoder block as a function: attention and feed forward on the residual stream."""

from collections.abc import Callable
from typing import Any

from keras_gemma.config import GemmaConfig
from keras_gemma.model.attention import attention
from keras_gemma.model.feed_forward import feed_forward
from keras_gemma.model.hooks import Hooks, apply_hook
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
    hooks: Hooks = None,
    first_slot: Any = None,
) -> tuple[Any, tuple[Any, Any]]:
    """Computes one block. Gemma 2 also normalizes the output of each half, with its own norms.

    `x [B, T, D]` is the residual stream. The weights are named as in `GemmaConfig.weight_shapes`,
    and the hooks as in `BLOCK_HOOK_POINTS`. `dropout` is applied to the output of each half. The
    other arguments and the result are the same as in `attention`.
    """

    def normalize(x: Any, name: str) -> Any:
        return rms_normalize(x, weights[name], config.layer_norm_epsilon)

    x = apply_hook(hooks, "residual.before", x)
    half, keys_and_values = attention(
        normalize(x, "pre_attention_norm"),
        weights,
        config,
        rotary,
        mask,
        cache,
        slots,
        hooks,
        first_slot,
    )
    if "post_attention_norm" in weights:
        half = normalize(half, "post_attention_norm")
    x = x + dropout(apply_hook(hooks, "attention.output", half))
    x = apply_hook(hooks, "residual.middle", x)

    half = feed_forward(
        normalize(x, "pre_ffw_norm"), weights["gate"], weights["up"], weights["down"], hooks
    )
    if "post_ffw_norm" in weights:
        half = normalize(half, "post_ffw_norm")
    x = x + dropout(apply_hook(hooks, "feed_forward.output", half))
    return apply_hook(hooks, "residual.after", x), keys_and_values

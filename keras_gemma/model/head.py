"""Output head: hidden states to logits with the tied embedding."""

from typing import Any

from keras import ops

from keras_gemma import backend
from keras_gemma.config import GemmaConfig
from keras_gemma.model.normalization import rms_normalize


def soft_cap(x: Any, cap: float | None) -> Any:
    """Returns `cap * tanh(x / cap)`, or `x` if `cap` is `None` (Gemma 2, arXiv:2408.00118, 2.2)."""
    return x if cap is None else ops.tanh(x / cap) * cap


def to_logits(x: Any, packed: Any, cap: float | None) -> Any:
    """Multiplies normalized `x [..., D]` by the embedding; returns capped float32 `[..., V]`."""
    return soft_cap(ops.cast(backend.matmul(x, packed), "float32"), cap)


def final_norm(x: Any, weights: dict[str, Any], config: GemmaConfig) -> Any:
    """Normalizes the output of the last block `[..., D]`, for the head with these `weights`."""
    return rms_normalize(x, weights["final_norm"], config.layer_norm_epsilon)


def head(x: Any, weights: dict[str, Any], config: GemmaConfig) -> Any:
    """Converts the output of the last block `[..., D]` to logits, float32 `[..., V]`."""
    x = final_norm(x, weights, config)
    return to_logits(x, weights["token_embedding"], config.final_logit_soft_cap)

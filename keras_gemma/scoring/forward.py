"""Weights as constants, and logits with their hook. Runs eagerly or in a compiled program."""

from typing import Any

from keras_gemma.config import GemmaConfig
from keras_gemma.model.backbone import GemmaBackbone
from keras_gemma.model.head import to_logits
from keras_gemma.model.hooks import Hooks, apply_hook
from keras_gemma.model.weights import stop_gradients


def constant_weights(backbone: GemmaBackbone) -> dict[str, Any]:
    """Returns all packed weights as constants.

    Only gradients of activations are needed here, so none are computed for weights.
    """
    return stop_gradients(backbone.tensors())


def logits_of(x: Any, weights: dict[str, Any], config: GemmaConfig, hooks: Hooks = None) -> Any:
    """Returns the logits of `x [..., D]`, the output of the final norm: float32 `[..., V]`."""
    logits = to_logits(x, weights["head"]["token_embedding"], config.final_logit_soft_cap)
    return apply_hook(hooks, "logits", logits)

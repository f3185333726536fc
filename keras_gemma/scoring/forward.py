"""Weights as constants, logits with their hook, and the compiled programs of a backbone."""

import threading
from collections.abc import Callable
from typing import Any

from keras_gemma import backend
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


class CompiledScorer:
    """Base class of scorers with one backbone and its compiled programs.

    Args:
        backbone: The backbone. Its weights are read at each call, so training in between counts.
    """

    def __init__(self, backbone: GemmaBackbone) -> None:
        self.backbone = backbone
        self.config = backbone.config
        self.programs: dict[str, Callable[..., Any]] = {}
        self.lock = threading.Lock()

    def program(
        self, name: str, function: Callable[..., Any], donate: int | None = None
    ) -> Callable[..., Any]:
        """Returns the compiled `function`, which is compiled at its first use.

        It may overwrite the argument number `donate`.
        """
        with self.lock:
            if name not in self.programs:
                self.programs[name] = backend.compile(function, donate)
            return self.programs[name]

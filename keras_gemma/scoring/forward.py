"""From ids to what the head reads, with a look at every hook point.

Runs as it is, where Python looks on, or as a part of a compiled program.
"""

from typing import Any

from keras import ops, tree

from keras_gemma.config import GemmaConfig
from keras_gemma.model.backbone import GemmaBackbone
from keras_gemma.model.head import to_logits
from keras_gemma.model.hooks import Hooks, apply_hook


def constant_weights(backbone: GemmaBackbone) -> dict[str, Any]:
    """All packed weights, by which no gradient passes: those of activations are asked for here.

    So a gradient keeps no activations for the sake of weights, and computes none of theirs.
    """
    return tree.map_structure(
        lambda x: None if x is None else ops.stop_gradient(x), backbone.tensors()
    )


def logits_of(x: Any, weights: dict[str, Any], config: GemmaConfig, hooks: Hooks = None) -> Any:
    """What the head says of `x [..., D]`, normalised: float32 `[..., V]`, capped."""
    logits = to_logits(x, weights["head"]["token_embedding"], config.final_logit_soft_cap)
    return apply_hook(hooks, "logits", logits)

"""Hook points of a decoder block, where functions can read and replace activations.

Hooks are a dictionary from hook points to functions `x -> x`, or `None`. The result of a function
replaces the activation. Without hooks, nothing is added to a program.
"""

from collections.abc import Callable, Mapping
from typing import Any

Hooks = Mapping[str, Callable[[Any], Any]] | None

BLOCK_HOOK_POINTS = {
    "residual.before": "[B, T, D], input of the block",
    "attention.queries": "[B, T, N, H], rotated",
    "attention.keys": "[B, T, K, H], rotated",
    "attention.values": "[B, T, K, H]",
    "attention.weights": "float32 [B, N, T, S], rows that sum to 1",
    "attention.heads": "[B, T, N, H], the weighted values",
    "attention.output": "[B, T, D], output of the attention half",
    "residual.middle": "[B, T, D], between the halves",
    "feed_forward.gate": "[B, T, F], after its GELU",
    "feed_forward.output": "[B, T, D], output of the feed-forward half",
    "residual.after": "[B, T, D], output of the block",
}
"""Activation at each hook point of a block, in the order of the data."""


def apply_hook(hooks: Hooks, hook_point: str, x: Any) -> Any:
    """Returns the result of the hook at `hook_point`, or `x` itself without one."""
    return hooks[hook_point](x) if hooks and hook_point in hooks else x

"""Where others may look into a block: named places, and functions that see what stands there.

Taps are a dict from names to functions `x -> x`, or None. What is there flows on through the
function of its name; with no taps, nothing is added to a program.
"""

from collections.abc import Callable, Mapping
from typing import Any

Taps = Mapping[str, Callable[[Any], Any]] | None

BLOCK_PLACES = {
    "residual.before": "[B, T, D], what the block reads",
    "attention.queries": "[B, T, N, H], rotated",
    "attention.keys": "[B, T, K, H], rotated",
    "attention.values": "[B, T, K, H]",
    "attention.weights": "float32 [B, N, T, S], rows that sum to 1",
    "attention.heads": "[B, T, N, H], the weighted values",
    "attention.output": "[B, T, D], what the first half adds",
    "residual.middle": "[B, T, D], between the halves",
    "feed_forward.gate": "[B, T, F], after its GELU",
    "feed_forward.output": "[B, T, D], what the second half adds",
    "residual.after": "[B, T, D], what the next block reads",
}
"""The places in a block, in the order of the data, and what stands there."""


def tapped(taps: Taps, name: str, x: Any) -> Any:
    """What goes on from the place `name` where `x` has arrived."""
    return taps[name](x) if taps and name in taps else x

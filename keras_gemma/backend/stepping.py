"""The loop of a backend that steps from Python: one compiled step a turn."""

from collections.abc import Callable
from typing import Any


def run(
    proceed: Callable[[Any], Any],
    step: Callable[[Any, Any], Any],
    weights: Any,
    state: Any,
    limit: int,
) -> Any:
    """`state` after as many steps as `proceed(state)` allows, at most `limit`.

    `proceed` must be cheap: its answer is read by Python after each step.
    """
    for _ in range(limit):
        if not bool(proceed(state)):
            break
        state = step(weights, state)
    return state

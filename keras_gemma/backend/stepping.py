"""While loop in Python that calls one compiled step per iteration."""

from collections.abc import Callable
from typing import Any


def run(
    cond: Callable[[Any], Any],
    step: Callable[[Any, Any], Any],
    weights: Any,
    state: Any,
    limit: int,
) -> Any:
    """Runs `step` while `cond(state)` is True, at most `limit` times; returns the state.

    `cond` must be cheap, because Python reads its result before each step.
    """
    for _ in range(limit):
        if not bool(cond(state)):
            break
        state = step(weights, state)
    return state

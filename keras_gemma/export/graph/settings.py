"""Generation settings of a call of a served model, and checks of inputs in the graph."""

from typing import Any, NamedTuple

import tensorflow as tf


class Settings(NamedTuple):
    """Generation settings of all sequences of a call. All are scalars except `stop`."""

    max_new_tokens: tf.Tensor
    temperature: tf.Tensor
    top_k: tf.Tensor
    top_p: tf.Tensor
    min_p: tf.Tensor
    seed: tf.Tensor  # -1 draws a random seed
    stop: tf.Tensor  # stop strings [N]


def check(condition: tf.Tensor, message: str, received: tf.Tensor) -> tf.Operation:
    """Returns an operation that raises `InvalidArgumentError` unless all of `condition` is True."""
    return tf.debugging.Assert(tf.reduce_all(condition), [message, received])


def checked(tensor: Any, checks: list[tf.Operation]) -> Any:
    """Returns `tensor`, which is available only after the checks."""
    with tf.control_dependencies(checks):
        return tf.identity(tensor)


def check_settings(settings: Settings) -> list[tf.Operation]:
    """Returns the operations that check the settings."""
    conditions = {
        "max_new_tokens": (settings.max_new_tokens >= 1, "an integer >= 1"),
        "temperature": (settings.temperature >= 0, "a number >= 0; 0 is greedy"),
        "top_k": (settings.top_k >= 0, "an integer >= 1, or 0 for all tokens"),
        "top_p": ((settings.top_p > 0) & (settings.top_p <= 1), "a number in (0, 1]"),
        "min_p": ((settings.min_p >= 0) & (settings.min_p <= 1), "a number in [0, 1]"),
        "stop": (tf.strings.length(settings.stop) > 0, "strings that are not empty"),
    }
    return [
        check(condition, f"`{name}` must be {expected}. Received:", getattr(settings, name))
        for name, (condition, expected) in conditions.items()
    ]

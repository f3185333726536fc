"""What a call of a served model is checked for, in the graph."""

import tensorflow as tf

from keras_gemma.export.graph.decoding import Settings


def check(good: tf.Tensor, message: str, received: tf.Tensor) -> tf.Operation:
    """An operation that raises `InvalidArgumentError` where `good` is not true throughout."""
    return tf.debugging.Assert(tf.reduce_all(good), [message, received])


def check_settings(settings: Settings) -> list[tf.Operation]:
    """The checks of how to continue."""
    wanted = {
        "max_new_tokens": (settings.max_new_tokens >= 1, "an integer >= 1"),
        "temperature": (settings.temperature >= 0, "a number >= 0; 0 is greedy"),
        "top_k": (settings.top_k >= 0, "an integer >= 1, or 0 for all tokens"),
        "top_p": ((settings.top_p > 0) & (settings.top_p <= 1), "a number in (0, 1]"),
        "min_p": ((settings.min_p >= 0) & (settings.min_p <= 1), "a number in [0, 1]"),
        "stop": (tf.strings.length(settings.stop) > 0, "strings that are not empty"),
    }
    return [
        check(good, f"`{name}` must be {what}. Received:", getattr(settings, name))
        for name, (good, what) in wanted.items()
    ]

"""Masks of allowed tokens, as bits."""

from typing import Any

from keras import ops

from keras_gemma.backend.reference import LOWEST


def apply_token_mask(logits: Any, words: Any) -> Any:
    """Returns `logits`, with the lowest value at tokens that are not allowed.

    Args:
        logits: float32 `[B, V]`.
        words: Allowed tokens, int32 `[B, W]`: bit `i % 32` of word `i // 32` is set if token i is
            allowed. W is at least V / 32.
    """
    shifts = ops.arange(32, dtype="int32")[None, None]
    bits = ops.bitwise_and(ops.bitwise_right_shift(words[:, :, None], shifts), 1)
    bits = ops.reshape(bits, (-1, 32 * words.shape[1]))[:, : logits.shape[1]]
    return ops.where(bits == 1, logits, LOWEST)

"""Penalties of tokens that a text already has."""

from typing import Any

from keras import ops


def penalize(
    logits: Any,
    seen: Any = None,
    repetition: Any = None,
    counts: Any = None,
    frequency: Any = None,
    presence: Any = None,
) -> Any:
    """Returns `logits` after the repetition, the frequency and the presence penalty.

    The repetition penalty divides positive logits, and multiplies negative ones (Keskar et al.,
    2019, arXiv:1909.05858). The other two are subtracted, as in OpenAI's API: the frequency penalty
    once per occurrence, and the presence penalty once per token.

    Args:
        logits: float32 `[B, V]`.
        seen: Tokens in the prompt or the new text, bool `[B, V]`. `None` disables `repetition`.
        repetition: float32 `[B]`; 1 changes nothing.
        counts: Occurrences in the new text, int32 `[B, V]`. `None` disables the next two.
        frequency, presence: float32 `[B]`; 0 changes nothing.
    """
    if seen is not None:
        factor = repetition[:, None]
        penalized = ops.where(logits > 0, logits / factor, logits * factor)
        logits = ops.where(seen, penalized, logits)
    if counts is not None:
        logits = logits - ops.cast(counts, "float32") * frequency[:, None]
        logits = logits - ops.cast(counts > 0, "float32") * presence[:, None]
    return logits

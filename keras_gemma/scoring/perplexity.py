"""Log-probability of each token of a text, and perplexity, over sliding windows.

    stride 2, window 4       0 1 2 3 4 5 6
    first window             b x x x            b: read only, x: read and counted
    second                       b b x x
    third                            b b x

https://huggingface.co/docs/transformers/perplexity explains why windows overlap.
"""

import dataclasses
from typing import Any

import numpy as np
from keras import ops

from keras_gemma.scoring.inputs import encode_one, read_integer, tokens_of
from keras_gemma.text.batches import holds_strings, is_text


@dataclasses.dataclass(frozen=True)
class TokenScores:
    """Log-probability of each token of one text."""

    tokens: list[str]
    """All T tokens, including `<bos>`."""
    token_ids: np.ndarray
    """Token ids, int32 `[T]`."""
    log_probabilities: np.ndarray
    """Log-probability of each token given the tokens before it, float64 `[T]`, in nats.

    The first is NaN.
    """

    @property
    def surprisal(self) -> np.ndarray:
        """Surprisal of each token, `[T]`, in bits."""
        return -self.log_probabilities / np.log(2)

    @property
    def perplexity(self) -> float:
        """Perplexity of the text: e to the mean loss of a token."""
        return float(np.exp(-np.mean(self.log_probabilities[1:])))


def windows(length: int, stride: int, window: int) -> list[tuple[int, int, int]]:
    """Returns the sliding windows over a text of `length` tokens.

    Returns:
        List of `(start, first counted position, end)`.
    """
    spans = []
    start, first = 0, 1
    while first < length:
        end = min(start + window, length)
        spans.append((start, first, end))
        start, first = start + stride, end
    return spans


def score_tokens(
    lm: Any, text: Any, stride: int | None = None, window: int | None = None
) -> TokenScores:
    """Returns the log-probability of each token of a text of any length.

    Args:
        lm: A `GemmaCausalLM`.
        text: A string, or a list of token ids.
        stride: Same as in `GemmaCausalLM.perplexity`.
        window: Same as in `GemmaCausalLM.perplexity`.

    Returns:
        The `TokenScores` of the text.

    Raises:
        ValueError: If the text has fewer than two tokens, `window` exceeds the context length, or
            `stride` is not smaller than `window`.

    Example:

    ```python
    import keras_gemma

    lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
    scores = keras_gemma.scoring.score_tokens(lm, "To be, or not to be")
    print(dict(zip(scores.tokens, scores.surprisal.round(1))), scores.perplexity)
    ```
    """
    return _score(lm, _read(lm, text, "text"), *_sizes(lm, stride, window))


def _sizes(lm: Any, stride: int | None, window: int | None) -> tuple[int, int]:
    """Returns stride and window, checked and with defaults."""
    context = lm.backbone.config.context_length
    advice = f"The model's context is {context}."
    window = context if window is None else read_integer("window", window, 2, context, advice)
    advice = f"It must be below window={window}."
    stride = window // 2 if stride is None else stride
    return read_integer("stride", stride, 1, window - 1, advice), window


def _read(lm: Any, text: Any, name: str) -> np.ndarray:
    """Returns a text of at least two tokens as int32 `[T]`."""
    ids = encode_one(lm, text, name)
    if len(ids) < 2:
        raise ValueError(
            f"`{name}` must have at least two tokens, because the first one is not predicted. "
            f"Received: {text!r:.80}, which has the tokens {tokens_of(lm, ids)}"
        )
    return ids


def _score(lm: Any, ids: np.ndarray, stride: int, window: int) -> TokenScores:
    log_probabilities = np.full(len(ids), np.nan)
    for start, first, end in windows(len(ids), stride, window):
        targets = np.roll(ids[start:end], -1)[None]
        loss = lm.score(ids[None, start:end], scoring_mode="loss", target_ids=targets)
        loss = ops.convert_to_numpy(loss)[0]
        log_probabilities[first:end] = -loss[first - start - 1 : end - start - 1]
    return TokenScores(tokens_of(lm, ids), ids, log_probabilities)


def perplexity(
    lm: Any, texts: Any, stride: int | None = None, window: int | None = None
) -> float | np.ndarray:
    """Implements `GemmaCausalLM.perplexity`."""
    sizes = _sizes(lm, stride, window)
    if is_text(texts):
        return _score(lm, _read(lm, texts, "texts"), *sizes).perplexity
    if not holds_strings(texts) and not isinstance(texts, list | tuple | np.ndarray):
        raise TypeError(
            "`texts` must be a string, or a list of strings or of lists of token ids. "
            f"Received: {texts!r:.80}"
        )
    if len(texts) == 0:
        raise ValueError("`texts` must have at least one text. Received: an empty list")
    rows = [_read(lm, text, f"texts[{i}]") for i, text in enumerate(texts)]
    return np.array([_score(lm, ids, *sizes).perplexity for ids in rows])

"""The log-probability of each token of a text, and perplexity, over windows that slide.

    stride 2, window 4       0 1 2 3 4 5 6
    first window             b x x x            b is read, x is read and counted
    second                       b b x x
    third                            b b x

(https://huggingface.co/docs/transformers/perplexity says why windows overlap.)
"""

import dataclasses
from typing import Any

import numpy as np
from keras import ops

from keras_gemma.scoring.inputs import encode_one, holds_text, tokens_of, whole_number
from keras_gemma.text.batches import is_text


@dataclasses.dataclass(frozen=True)
class TokenScores:
    """What a model thinks of each token of one text."""

    tokens: list[str]
    """All T, `<bos>` too."""
    token_ids: np.ndarray
    """int32 `[T]`."""
    log_probabilities: np.ndarray
    """float64 `[T]`, in nats; the first is NaN, for nothing stands before it."""

    @property
    def surprisal(self) -> np.ndarray:
        """`[T]`, in bits."""
        return -self.log_probabilities / np.log(2)

    @property
    def perplexity(self) -> float:
        """e to the mean of what is lost at a token."""
        return float(np.exp(-np.mean(self.log_probabilities[1:])))


def windows(length: int, stride: int, window: int) -> list[tuple[int, int, int]]:
    """Beginnings, the first position that counts, and ends, for a text of `length` tokens."""
    found = []
    start, counted = 0, 1
    while counted < length:
        end = min(start + window, length)
        found.append((start, counted, end))
        start, counted = start + stride, end
    return found


def score_tokens(
    lm: Any, text: Any, stride: int | None = None, window: int | None = None
) -> TokenScores:
    """The log-probability of each token of a text of any length, given those before it.

    Args:
        lm: a `GemmaCausalLM`.
        text: a string, or its ids.
        stride, window: as of `GemmaCausalLM.perplexity`.

    Raises:
        ValueError: a text of fewer than two tokens; a window beyond the context, or a stride that
            is not below the window.

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
    """Both, checked."""
    context = lm.backbone.config.context_length
    remark = f", and the model's context is {context}"
    window = context if window is None else whole_number("window", window, 2, context, remark)
    remark = f", below window={window}"
    stride = window // 2 if stride is None else stride
    return whole_number("stride", stride, 1, window - 1, remark), window


def _read(lm: Any, text: Any, name: str) -> np.ndarray:
    """int32 `[T]`, where there is something to predict."""
    ids = encode_one(lm, text, name)
    if len(ids) < 2:
        raise ValueError(
            f"`{name}` must have two tokens at least, for the first has nothing before it. "
            f"Received: {text!r:.80}, which is {tokens_of(lm, ids)}"
        )
    return ids


def _score(lm: Any, ids: np.ndarray, stride: int, window: int) -> TokenScores:
    log_probabilities = np.full(len(ids), np.nan)
    for start, counted, end in windows(len(ids), stride, window):
        targets = np.roll(ids[start:end], -1)[None]
        loss = lm.score(ids[None, start:end], scoring_mode="loss", target_ids=targets)
        loss = ops.convert_to_numpy(loss)[0]
        log_probabilities[counted:end] = -loss[counted - start - 1 : end - start - 1]
    return TokenScores(tokens_of(lm, ids), ids, log_probabilities)


def perplexity(
    lm: Any, texts: Any, stride: int | None = None, window: int | None = None
) -> float | np.ndarray:
    """See `GemmaCausalLM.perplexity`."""
    sizes = _sizes(lm, stride, window)
    if is_text(texts):
        return _score(lm, _read(lm, texts, "texts"), *sizes).perplexity
    if not holds_text(texts) and not isinstance(texts, list | tuple | np.ndarray):
        raise TypeError(
            "`texts` must be a string, or a list of strings or of lists of ids. "
            f"Received: {texts!r:.80}"
        )
    if len(texts) == 0:
        raise ValueError("`texts` must hold a text at least. Received: an empty list")
    rows = [_read(lm, text, f"texts[{i}]") for i, text in enumerate(texts)]
    return np.array([_score(lm, ids, *sizes).perplexity for ids in rows])

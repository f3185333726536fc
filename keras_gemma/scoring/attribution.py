"""How much each token of a prompt speaks for the token that follows.

Gradient times input is the gradient of the answer's log-probability times the embeddings.
Integrated gradients is its mean on the way from another text, times the way, and sums to what the
way gains (Sundararajan et al., 2017, arXiv:1703.01365). The other text is one of padding: from
embeddings of zero the way leads nowhere, since norms make large ones of the smallest.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops

from keras_gemma import backend
from keras_gemma.scoring.answer import log_probability, read_answer
from keras_gemma.scoring.gradient import gradient
from keras_gemma.scoring.inputs import encode_short, tokens_of, whole_number

PADDING, START = 0, 2
"""Ids of `<pad>` and `<bos>` in every vocabulary of Gemma."""

LARGEST_BATCH = 16
"""Steps of the way whose gradients are taken at once."""


@dataclasses.dataclass(frozen=True)
class Attribution:
    """The share of each token in the log-probability of an answer."""

    tokens: list[str]
    """The T tokens of the prompt."""
    answer: str
    """The token whose log-probability is explained."""
    method: str
    """`"gradient times input"` or `"integrated gradients"`."""
    scores: np.ndarray
    """float32 `[T]`, in nats."""
    log_probability: float
    """Of the answer after the prompt, in nats."""
    baseline: float | None = None
    """The same at the start of the way: `scores` of integrated gradients sum to what it gains."""


def gradient_times_input(lm: Any, text: Any, answer: str | int) -> Attribution:
    """The gradient of the answer's log-probability times each token's embedding.

    Args:
        lm: a `GemmaCausalLM`.
        text: the prompt, a string or its ids.
        answer: the next token, as one piece or as an id.

    Raises:
        ValueError: an answer of several tokens; a text longer than the context.

    Example:

    ```python
    import keras_gemma

    lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
    shares = keras_gemma.scoring.gradient_times_input(lm, "To be, or not to", " be")
    print(dict(zip(shares.tokens, shares.scores.round(2))))
    ```
    """
    of_answer, embeddings = _question(lm, ids := encode_short(lm, text), answer)
    slope = gradient(of_answer, embeddings[None])[0]
    (gained,) = _numbers(of_answer, embeddings)
    return _result(lm, ids, answer, "gradient times input", slope * embeddings, gained)


def integrated_gradients(
    lm: Any, text: Any, answer: str | int, steps: int = 64, baseline: int = PADDING
) -> Attribution:
    """The mean gradient on the straight way from a text that says nothing, times the way.

    Args:
        lm, text, answer: as of `gradient_times_input`.
        steps: points on the way, at the middles of as many pieces. With enough of them the scores
            sum to `log_probability - baseline` of the result.
        baseline: the id that stands at every position of the other text, but that of `<bos>`.

    Raises:
        ValueError: as `gradient_times_input`; fewer than one step; an id outside the vocabulary.

    Example:

    ```python
    import keras_gemma

    lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
    shares = keras_gemma.scoring.integrated_gradients(lm, "To be, or not to", " be", steps=32)
    print(shares.scores.sum(), shares.log_probability - shares.baseline)
    ```
    """
    steps = whole_number("steps", steps, 1, np.inf)
    baseline = whole_number("baseline", baseline, 0, lm.backbone.config.vocabulary_size - 1)
    of_answer, end = _question(lm, ids := encode_short(lm, text), answer)
    start = _embed(lm, np.where(ids == START, START, baseline))
    where = (np.arange(steps, dtype="float32") + 0.5) / steps
    total = np.zeros(end.shape, "float32")
    for i in range(0, steps, LARGEST_BATCH):
        points = start + where[i : i + LARGEST_BATCH, None, None] * (end - start)
        total += gradient(of_answer, points).sum(0)
    gained, least = _numbers(of_answer, end, start)
    shares = total / steps * (end - start)
    return _result(lm, ids, answer, "integrated gradients", shares, gained, least)


def _question(lm: Any, ids: np.ndarray, answer: str | int) -> tuple[Callable[[Any], Any], Any]:
    """The answer's log-probability as a function of embeddings `[B, T, D]`, and the text's own."""
    answer_id = read_answer(lm, answer)
    dtype = lm.backbone.compute_dtype

    def of_answer(embeddings: Any) -> Any:
        """`[B, T, D]` -> `[B]`."""
        texts = np.repeat(ids[None], embeddings.shape[0], axis=0)
        replace = {"embeddings": lambda _: ops.cast(embeddings, dtype)}
        return log_probability(lm, texts, answer_id, replace)

    return of_answer, _embed(lm, ids)


def _embed(lm: Any, ids: np.ndarray) -> np.ndarray:
    """float32 `[T, D]`."""
    table = lm.backbone.token_embedding.tensor
    rows = backend.embed(ops.convert_to_tensor(ids), table, lm.backbone.compute_dtype)
    return ops.convert_to_numpy(ops.cast(rows, "float32"))


def _numbers(function: Callable[[Any], Any], *points: np.ndarray) -> list[float]:
    return ops.convert_to_numpy(function(ops.convert_to_tensor(np.stack(points)))).tolist()


def _result(
    lm: Any,
    ids: np.ndarray,
    answer: str | int,
    method: str,
    shares: np.ndarray,
    *log_probabilities: float,
) -> Attribution:
    """`shares [T, D]` as those of tokens."""
    (name,) = tokens_of(lm, np.array([read_answer(lm, answer)]))
    return Attribution(tokens_of(lm, ids), name, method, shares.sum(-1), *log_probabilities)

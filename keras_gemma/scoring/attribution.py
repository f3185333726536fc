"""Attribution of the next token to the tokens of a prompt.

Gradient times input multiplies the embeddings by the gradient of the answer's log-probability.
Integrated gradients averages that gradient along the straight path from a baseline and multiplies
it by the path (Sundararajan et al., 2017, arXiv:1703.01365). The attributions sum to the change
in log-probability. The baseline is a padded text: zero embeddings are unsuitable because RMSNorm
rescales arbitrarily small inputs.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops

from keras_gemma import backend, progress
from keras_gemma.scoring.answer import log_probability, read_answer
from keras_gemma.scoring.gradient import gradient
from keras_gemma.scoring.inputs import encode_short, read_integer, tokens_of

PADDING, START = 0, 2
"""Ids of `<pad>` and `<bos>` in every Gemma vocabulary."""

MAX_BATCH_SIZE = 16
"""Maximum number of integration steps whose gradients are computed in one batch."""


@dataclasses.dataclass(frozen=True)
class Attribution:
    """Contribution of each token to the log-probability of an answer."""

    tokens: list[str]
    """The T tokens of the prompt."""
    answer: str
    """Token whose log-probability is explained."""
    method: str
    """Name of the method: `"gradient times input"` or `"integrated gradients"`."""
    scores: np.ndarray
    """Attribution of each token, float32 `[T]`, in nats."""
    log_probability: float
    """Log-probability of the answer after the prompt, in nats."""
    baseline: float | None = None
    """Log-probability after the baseline, in nats; `None` unless integrated gradients were used.

    Scores of integrated gradients sum to `log_probability - baseline`.
    """


def gradient_times_input(lm: Any, text: Any, answer: str | int) -> Attribution:
    """Multiplies each token's embedding by the gradient of the answer's log-probability.

    Args:
        lm: A `GemmaCausalLM`.
        text: The prompt, a string or a list of token ids.
        answer: The next token, as a string of one token or as an id.

    Returns:
        An `Attribution` with one score for each token.

    Raises:
        ValueError: If the answer has several tokens, or the text is longer than the context.

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
    (log_prob,) = _values(of_answer, embeddings)
    return _result(lm, ids, answer, "gradient times input", slope * embeddings, log_prob)


def integrated_gradients(
    lm: Any, text: Any, answer: str | int, steps: int = 64, baseline: int = PADDING
) -> Attribution:
    """Multiplies the mean gradient along a straight path from a baseline by the path.

    Args:
        lm: A `GemmaCausalLM`.
        text: Same as in `gradient_times_input`.
        answer: Same as in `gradient_times_input`.
        steps: Number of points on the path, by the midpoint rule. With enough steps the scores
            sum to `log_probability - baseline` of the result.
        baseline: Token id at every position of the baseline text except that of `<bos>`.
            `<pad>` by default.

    Returns:
        An `Attribution` with one score for each token.

    Raises:
        ValueError: If an argument is invalid as in `gradient_times_input`, `steps` is not
            positive, or `baseline` is not in the vocabulary.

    Example:

    ```python
    import keras_gemma

    lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
    shares = keras_gemma.scoring.integrated_gradients(lm, "To be, or not to", " be", steps=32)
    print(shares.scores.sum(), shares.log_probability - shares.baseline)
    ```
    """
    steps = read_integer("steps", steps, 1)
    baseline = read_integer("baseline", baseline, 0, lm.backbone.config.vocabulary_size - 1)
    of_answer, end = _question(lm, ids := encode_short(lm, text), answer)
    start = _embed(lm, np.where(ids == START, START, baseline))
    fractions = (np.arange(steps, dtype="float32") + 0.5) / steps
    total = np.zeros(end.shape, "float32")
    with progress.bar("Integrating", steps) as advance:
        for i in range(0, steps, MAX_BATCH_SIZE):
            points = start + fractions[i : i + MAX_BATCH_SIZE, None, None] * (end - start)
            total += gradient(of_answer, points).sum(0)
            advance(len(points))
    end_log_prob, start_log_prob = _values(of_answer, end, start)
    shares = total / steps * (end - start)
    return _result(lm, ids, answer, "integrated gradients", shares, end_log_prob, start_log_prob)


def _question(lm: Any, ids: np.ndarray, answer: str | int) -> tuple[Callable[[Any], Any], Any]:
    """Returns the answer's log-probability as a function of embeddings, and the text's embeddings.

    The function maps `[B, T, D]` to `[B]`.
    """
    answer_id = read_answer(lm, answer)
    dtype = lm.backbone.compute_dtype

    def of_answer(embeddings: Any) -> Any:
        texts = np.repeat(ids[None], embeddings.shape[0], axis=0)
        replace = {"embeddings": lambda _: ops.cast(embeddings, dtype)}
        return log_probability(lm, texts, answer_id, replace)

    return of_answer, _embed(lm, ids)


def _embed(lm: Any, ids: np.ndarray) -> np.ndarray:
    """Returns the embeddings of ids, float32 `[T, D]`."""
    table = lm.backbone.token_embedding.tensor
    rows = backend.embed(backend.to_tensor(ids), table, lm.backbone.compute_dtype)
    return ops.convert_to_numpy(ops.cast(rows, "float32"))


def _values(function: Callable[[Any], Any], *points: np.ndarray) -> list[float]:
    return ops.convert_to_numpy(function(backend.to_tensor(np.stack(points)))).tolist()


def _result(
    lm: Any,
    ids: np.ndarray,
    answer: str | int,
    method: str,
    shares: np.ndarray,
    *log_probabilities: float,
) -> Attribution:
    """Sums `shares [T, D]` over the embedding axis."""
    (name,) = tokens_of(lm, np.array([read_answer(lm, answer)]))
    return Attribution(tokens_of(lm, ids), name, method, shares.sum(-1), *log_probabilities)

"""Settings and rule of beam search. The search is in `generation/strategies/beam.py`."""

import dataclasses
from collections.abc import Hashable
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops

from keras_gemma import backend
from keras_gemma.checks import check_bool, check_integer, check_numbers
from keras_gemma.generation.samplers.loop import Next, Prompt, repeat_numbers, take_rows
from keras_gemma.generation.samplers.sampler import Numbers, Sampler, Seeds, tempered


@keras.saving.register_keras_serializable(package="keras_gemma")
@dataclasses.dataclass(frozen=True)
class BeamSampler(Sampler):
    """Searches for the most likely sequence, with `num_beams` candidates per prompt.

    The score of a sequence with n new tokens is

        (log p_1 + ... + log p_n) / n ** length_penalty

    A finished sequence keeps its score, and its place until better candidates replace it. The
    search does not use a seed, and does not support `stream` or `stop` strings.

    Args:
        num_beams: Number of candidates per prompt; 1 is greedy decoding. Defaults to 5.
        return_all_beams: If True, returns a list of all candidates per prompt, best first. If
            False, returns the best `num_return_sequences`. With `return_logprobs`, each sequence
            has a `score`. Defaults to False.
        length_penalty: Exponent of the length; 0, as in KerasHub, prefers short sequences,
            1 compares mean log-probabilities, and larger values favor long sequences. A number,
            or a list with one value per prompt. Defaults to 0.
        temperature: Divisor of the logits. A number, or a list with one value per prompt. Defaults
            to 1.

    Raises:
        ValueError: If an argument is out of range.

    Example:

    ```python
    import keras_gemma

    lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
    lm.compile(sampler=keras_gemma.samplers.BeamSampler(num_beams=3, return_all_beams=True))
    for beam in lm.generate("ROMEO:", max_new_tokens=12, return_logprobs=True):
        print(beam.score, beam.text)
    ```
    """

    strategy: ClassVar[str] = "beam"

    num_beams: int = 5
    return_all_beams: bool = False
    length_penalty: Numbers = 0.0
    temperature: Numbers = 1.0

    def check(self) -> None:
        super().check()
        check_integer("num_beams", self.num_beams, advice="It is the same for all prompts.")
        check_bool("return_all_beams", self.return_all_beams)
        check_numbers("length_penalty", self.length_penalty, "(-1000, 1000)")

    def rule(self) -> Hashable:
        return "beam", self.num_beams

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"length_penalty": self.length_penalty}

    @property
    def num_return_sequences(self) -> int:
        return self.num_beams if self.return_all_beams else 1

    def init(self, batch: int, seed: Seeds = None, row_keys: Any = None) -> dict[str, Any]:
        # The beams of a prompt are equal at first, so all but one begin with the score -inf.
        first = np.arange(batch) % self.num_beams == 0
        return super().init(batch, seed, row_keys) | {
            "total": backend.to_tensor(np.where(first, 0.0, -np.inf).astype("float32")),
            "count": ops.zeros(batch, dtype="int32"),
        }

    def decode(
        self, next: Next, prompt: Prompt, tokens: Any, cache: Any, index: Any, hidden_states: Any
    ) -> Any:
        batch, length = tokens.shape
        beams = self.num_beams
        rows = repeat_numbers(batch, beams)
        prompt = prompt.repeat(beams)

        def body(index: Any, tokens: Any, cache: Any, state: Any) -> tuple[Any, Any, Any]:
            logits, _, cache = next(tokens, cache, index)
            logits = ops.broadcast_to(logits, (batch * beams, logits.shape[-1]))
            fixed = prompt.is_fixed(tokens, index)
            parents, ids, state = best_beams(logits, fixed, state, beams)
            tokens = prompt.write(take_rows(tokens, parents), index, ids)
            return tokens, take_rows(cache, parents), state

        state = self.init(batch * beams)
        tokens, cache = take_rows(tokens, rows), take_rows(cache, rows)
        tokens, _, state = prompt.loop(body, index, tokens, cache, state)
        scores = score(state["total"], state["count"], state["length_penalty"])
        scores, order = ops.top_k(ops.reshape(scores, (batch, beams)), beams)
        tokens = ops.reshape(tokens, (batch, beams, length))
        tokens = ops.take_along_axis(tokens, order[:, :, None], axis=1)
        return (tokens, scores) if self.return_all_beams else tokens[:, 0]


def best_beams(
    logits: Any, done: Any, state: dict[str, Any], beams: int
) -> tuple[Any, Any, dict[str, Any]]:
    """Chooses the next beams of each prompt, among all candidates of its beams.

    Args:
        logits: float32 `[B, V]`. The rows are prompts x beams.
        done: bool `[B]`, True for beams that are their own only candidate, at no cost.
        state: State of the sampler.
        beams: Number of beams per prompt.

    Returns:
        For each new beam, the row that it continues and the next id, both int32 `[B]`, and the next
        state of the sampler.
    """
    rows, vocabulary_size = logits.shape
    width = min(beams, vocabulary_size)
    logits = tempered(ops.cast(logits, "float32"), state)
    # [B, width], because at most `width` candidates of one beam can be among the best.
    gains, ids = ops.top_k(logits - ops.logsumexp(logits, axis=-1, keepdims=True), width)
    first = ops.arange(width, dtype="int32")[None] == 0
    only_itself = ops.where(first, 0.0, -np.inf)
    totals = state["total"][:, None] + ops.where(done[:, None], only_itself, gains)
    counts = state["count"] + ops.cast(ops.logical_not(done), "int32")
    scores = score(totals, counts[:, None], state["length_penalty"][:, None])

    _, best = ops.top_k(ops.reshape(scores, (-1, beams * width)), beams)  # [prompts, beams]
    offsets = ops.arange(rows // beams, dtype="int32")[:, None] * (beams * width)
    best = ops.reshape(ops.cast(best, "int32") + offsets, (rows,))
    parents = best // width
    total = ops.take(ops.reshape(totals, (-1,)), best)
    state = {**state, "total": total, "count": ops.take(counts, parents)}
    return parents, ops.take(ops.reshape(ops.cast(ids, "int32"), (-1,)), best), state


def score(total: Any, count: Any, length_penalty: Any) -> Any:
    """Returns the scores of beams with `count` new tokens, whose log-probabilities sum to `total`;
    larger is better."""
    return total / ops.maximum(ops.cast(count, "float32"), 1.0) ** length_penalty

"""Contrastive search: settings and rule. The search of `generate` is in
`generation/strategies/contrastive.py`."""

import dataclasses
from collections.abc import Hashable
from typing import Any, ClassVar

import keras
from keras import ops

from keras_gemma.checks import check_integer, check_numbers
from keras_gemma.generation.samplers.loop import Next, Prompt, repeat_numbers, take_rows
from keras_gemma.generation.samplers.sampler import Numbers, Sampler, tempered


@keras.saving.register_keras_serializable(package="keras_gemma")
@dataclasses.dataclass(frozen=True)
class ContrastiveSampler(Sampler):
    """Chooses a likely token that does not repeat the text so far.

    Contrastive search (Su et al., 2022, arXiv:2202.06417) evaluates the k most likely tokens and
    chooses the one with the largest

        (1 - alpha) * probability - alpha * similarity

    Similarity is the largest cosine between the hidden state of the token and those of all tokens
    before it, prompt included. Hidden states are taken after the final norm. The search does not
    use a seed, does not support `stream` or `stop` strings, and does not reuse a `prefix`.

    Args:
        k: Number of tokens to evaluate. Each decode step runs the model on k rows per prompt.
            Defaults to 5.
        alpha: Weight of the similarity, in [0, 1]; 0 is greedy decoding. A number, or a list with
            one value per prompt. Defaults to 0.6.
        temperature: Divisor of the logits. A number, or a list with one value per prompt. Defaults
            to 1.

    Raises:
        ValueError: If an argument is out of range.

    Example:

    ```python
    import keras_gemma

    lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
    lm.compile(sampler=keras_gemma.samplers.ContrastiveSampler(k=4, alpha=0.6))
    print(lm.generate("ROMEO:", max_new_tokens=20))
    ```
    """

    strategy: ClassVar[str] = "contrastive"

    k: int = 5
    alpha: Numbers = 0.6
    temperature: Numbers = 1.0

    def check(self) -> None:
        super().check()
        check_integer("k", self.k, advice="It is the same for all prompts.")
        check_numbers("alpha", self.alpha, "[0, 1]")

    def rule(self) -> Hashable:
        return "contrastive", self.k

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"alpha": self.alpha}

    def decode(
        self, next: Next, prompt: Prompt, tokens: Any, cache: Any, index: Any, hidden_states: Any
    ) -> Any:
        if hidden_states is None:
            raise ValueError(
                "`hidden_states` must be the hidden states of the prompt for a ContrastiveSampler. "
                "Received: hidden_states=None"
            )
        batch, k = tokens.shape[0], self.k
        candidates = prompt.repeat(k)
        rows = repeat_numbers(batch, k)
        first = ops.arange(batch, dtype="int32") * k

        def body(
            index: Any, tokens: Any, cache: Any, logits: Any, hidden: Any, state: Any
        ) -> tuple[Any, ...]:
            logits = tempered(ops.cast(logits, "float32"), state)
            probabilities, ids = ops.top_k(ops.softmax(logits, axis=-1), k)
            tokens = candidates.write(take_rows(tokens, rows), index, ops.reshape(ids, (-1,)))
            logits, new, cache = next(tokens, take_rows(cache, rows), index + 1)
            directions = ops.reshape(unit_vectors(new), (batch, k, 1, -1))
            similarity = ops.sum(unit_vectors(hidden)[:, None] * directions, axis=-1)  # [B, k, T]
            is_earlier = ops.arange(hidden.shape[1], dtype="int32") < index
            similarity = ops.max(ops.where(is_earlier, similarity, -1.0), axis=-1)
            best = first + best_candidate(probabilities, similarity, state)
            new = ops.cast(take_rows(new, best), hidden.dtype)
            hidden = ops.slice_update(hidden, [0, index, 0], new[:, None])
            tokens, cache, logits = take_rows((tokens, cache, logits), best)
            return tokens, cache, logits, hidden, state

        logits, _, cache = next(tokens, cache, ops.cast(index, "int32"))
        state = self.init(batch)
        return prompt.loop(body, index, tokens, cache, logits, hidden_states, state)[0]


def best_candidate(probabilities: Any, similarity: Any, state: dict[str, Any]) -> Any:
    """Returns the best of `k` candidates by `probabilities [B, k]` and `similarity [B, k]` to the
    most similar earlier token: int32 `[B]`."""
    alpha = state["alpha"][:, None]
    best = ops.argmax((1 - alpha) * probabilities - alpha * similarity, axis=-1)
    return ops.cast(best, "int32")


def unit_vectors(vectors: Any) -> Any:
    """Returns `vectors [..., D]`, divided by their L2 norms, in float32."""
    vectors = ops.cast(vectors, "float32")
    squared = ops.sum(ops.square(vectors), axis=-1, keepdims=True)
    return vectors * ops.rsqrt(ops.maximum(squared, 1e-12))

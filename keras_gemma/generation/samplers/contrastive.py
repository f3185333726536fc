"""Settings of contrastive search. The search is in `generation/strategies/contrastive.py`."""

import dataclasses
from collections.abc import Hashable
from typing import Any, ClassVar

import keras

from keras_gemma.checks import check_integer, check_numbers
from keras_gemma.generation.samplers.sampler import Numbers, Sampler


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

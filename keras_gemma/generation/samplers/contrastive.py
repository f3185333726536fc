"""Contrastive search: a likely token that says something new (Su et al., 2022, arXiv:2202.06417).

What may be set; the search itself is `generation/contrastive.py`.
"""

import dataclasses
from collections.abc import Hashable
from typing import Any, ClassVar

import keras
import numpy as np

from keras_gemma.generation.samplers.random import check_k
from keras_gemma.generation.samplers.sampler import Numbers, Sampler, check_numbers


@keras.saving.register_keras_serializable(package="keras_gemma")
@dataclasses.dataclass(frozen=True)
class ContrastiveSampler(Sampler):
    """Takes, among the `k` likeliest tokens, a likely one that is unlike the text so far.

    The token with the largest `(1 - alpha) * probability - alpha * similarity`, where similarity is
    the largest cosine between the model's hidden state at the token and those at all tokens before
    it, prompt included; hidden states are those behind the final norm. It has no use for a seed,
    and works neither in `stream` nor with `stop` strings. A `prefix` saves it no reading.

    Args:
        k: how many tokens are tried, each by the model: a step reads `k` rows for each prompt.
        alpha: in [0, 1]; 0 is greedy.
        temperature: divides the logits, of which the probabilities are made.

    Raises:
        ValueError: a setting out of range.

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

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        super().check()
        if isinstance(self.k, list | tuple | np.ndarray):
            raise ValueError(f"`k` must be one integer for all prompts. Received: k={self.k!r}")
        check_k(self.k, "k")
        check_numbers("alpha", self.alpha, "a number in [0, 1]", lambda x: 0 <= x <= 1)

    def rule(self) -> Hashable:
        return "contrastive", self.k

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"alpha": np.asarray(self.alpha, "float32")}

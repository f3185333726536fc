"""Random sampling, from all tokens or from those that the filters keep."""

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any

import keras

from keras_gemma.generation.samplers.filters import FILTERS
from keras_gemma.generation.samplers.sampler import (
    Numbers,
    Sampler,
    Seeds,
    check_numbers,
    draw,
    tempered,
)


class DrawingSampler(Sampler):
    """Base class of the samplers that filter the distribution and draw a token from it."""

    def check(self) -> None:
        super().check()
        for setting, value in self.settings().items():
            name = self.written.get(setting, setting)
            if setting == "top_k":
                check_numbers(name, value, "an integer >= 1", lambda x: 1 <= x < 2**31, whole=True)
            elif setting in FILTERS:
                check_numbers(name, value, "a number in (0, 1]", lambda x: 0 < x <= 1)

    def rule(self) -> Hashable:
        return "draw", *(name for name in FILTERS if name in self.settings())

    def choose(self, logits: Any, state: dict[str, Any]) -> Any:
        return draw(limit(logits, state), state)


def limit(logits: Any, state: dict[str, Any]) -> Any:
    """Applies the temperature and the filters in a sampler's `state` to logits `[B, V]`."""
    logits = tempered(logits, state)
    for name, keep in FILTERS.items():
        if name in state:
            logits = keep(logits, state[name])
    return logits


@keras.saving.register_keras_serializable(package="keras_gemma")
@dataclasses.dataclass(frozen=True)
class RandomSampler(DrawingSampler):
    """Samples from the whole distribution, `softmax(logits / temperature)`.

    The filters are applied in the order top-k (arXiv:1805.04833), top-p (arXiv:1904.09751) and
    min-p (arXiv:2407.01082), each to the tokens that the one before has kept.

    Args:
        seed: Same as in `Sampler`.
        temperature: Same as in `Sampler`.
        top_k: Number of most likely tokens to sample from. An integer, or a list with one value
            per row. `None` disables this filter.
        top_p: Total probability, in (0, 1], of the smallest set of tokens to sample from. A
            number, or a list with one value per row. `None` disables this filter.
        min_p: Minimum probability of a token, relative to the most likely one, in (0, 1]. A
            number, or a list with one value per row. `None` disables this filter.

    Raises:
        ValueError: If an argument is out of range.

    Example:

    ```python
    import keras_gemma

    lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
    lm.compile(sampler=keras_gemma.samplers.RandomSampler(seed=0, temperature=0.8, top_p=0.95))
    print(lm.generate("ROMEO:", max_new_tokens=20))
    ```
    """

    seed: Seeds = None
    temperature: Numbers = 1.0
    top_k: int | Sequence[int] | None = None
    top_p: Numbers | None = None
    min_p: Numbers | None = None

    def settings(self) -> dict[str, Numbers]:
        filters = {"top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}
        enabled = {name: value for name, value in filters.items() if value is not None}
        return super().settings() | enabled

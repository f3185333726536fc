"""Random sampling from all tokens, or from those that top-k, top-p and min-p filters keep.

No filter sorts the vocabulary. A binary search over the bits of float32, which are ordered like
the numbers, finds the smallest probability to keep.
"""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import keras
from keras import ops

from keras_gemma.backend.reference import LOWEST
from keras_gemma.checks import check_numbers
from keras_gemma.generation.samplers.sampler import (
    Numbers,
    Sampler,
    Seeds,
    draw,
    tempered,
)

ONE_BITS = 0x3F800000
"""Bits of 1.0 in float32. 31 halvings find any number in [0, 1] exactly."""


def _weights(logits: Any) -> Any:
    """Returns probabilities `[B, V]` relative to the most likely token, which has 1."""
    return ops.exp(logits - ops.max(logits, axis=-1, keepdims=True))


def _keep(logits: Any, weights: Any, enough: Callable[[Any], Any]) -> Any:
    """Returns `logits` with the fewest of the largest weights that are `enough`; others are LOWEST.

    `enough` maps the kept tokens, bool `[B, V]`, to bool `[B, 1]`; True if all tokens are kept.
    """
    bits = ops.view(weights, "int32")
    low = ops.zeros_like(bits[:, :1])
    high = low + ONE_BITS + 1

    def halve(_: Any, bounds: tuple[Any, Any]) -> tuple[Any, Any]:
        low, high = bounds
        middle = low + (high - low) // 2
        fits = enough(bits >= middle)
        return ops.where(fits, middle, low), ops.where(fits, high, middle)

    low, _ = ops.fori_loop(0, 31, halve, (low, high))
    return ops.where(bits >= low, logits, LOWEST)


def keep_top_k(logits: Any, k: Any) -> Any:
    """Keeps the `k [B]` largest of `logits [B, V]`, and all that equal the k-th one.

    Fan et al., 2018, arXiv:1805.04833.
    """
    k = ops.clip(k, 1, logits.shape[-1])[:, None]

    def enough(kept: Any) -> Any:
        return ops.sum(ops.cast(kept, "int32"), axis=-1, keepdims=True) >= k

    return _keep(logits, _weights(logits), enough)


def keep_top_p(logits: Any, p: Any) -> Any:
    """Keeps the fewest of `logits [B, V]` whose total probability is at least `p [B]`.

    Holtzman et al., 2019, arXiv:1904.09751.
    """
    weights = _weights(logits)
    # Sums of rounded probabilities may be below 1; then no set of tokens would reach p=1.
    p = ops.minimum(p, 1 - 1e-6)[:, None] * ops.sum(weights, axis=-1, keepdims=True)

    def enough(kept: Any) -> Any:
        return ops.sum(ops.where(kept, weights, 0.0), axis=-1, keepdims=True) >= p

    return _keep(logits, weights, enough)


def keep_min_p(logits: Any, p: Any) -> Any:
    """Keeps the `logits [B, V]` with at least `p [B]` times the largest probability.

    Nguyen et al., 2024, arXiv:2407.01082.
    """
    return ops.where(_weights(logits) >= p[:, None], logits, LOWEST)


FILTERS = {"top_k": keep_top_k, "top_p": keep_top_p, "min_p": keep_min_p}
"""Functions `(logits [B, V], value [B]) -> logits` by setting, in the order of their use."""


class DrawingSampler(Sampler):
    """Base class of the samplers that filter the distribution and draw a token from it."""

    def check(self) -> None:
        super().check()
        for setting, value in self.settings().items():
            name = self._argument_names.get(setting, setting)
            if setting == "top_k":
                check_numbers(name, value, f"[1, {2**31 - 1}]", whole=True)
            elif setting in FILTERS:
                check_numbers(name, value, "(0, 1]")

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
        filters = {name: getattr(self, name) for name in FILTERS}
        enabled = {name: value for name, value in filters.items() if value is not None}
        return super().settings() | enabled

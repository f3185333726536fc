"""Nucleus sampling (Holtzman et al., 2019, arXiv:1904.09751)."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import keras

from keras_gemma.generation.samplers.random import DrawingSampler
from keras_gemma.generation.samplers.sampler import Numbers, Seeds


@keras.saving.register_keras_serializable(package="keras_gemma")
@dataclasses.dataclass(frozen=True)
class TopPSampler(DrawingSampler):
    """Samples from the smallest set of tokens with total probability of at least `p`.

    Nucleus sampling (Holtzman et al., 2019, arXiv:1904.09751) keeps the most likely tokens until
    their probabilities, after `temperature` is applied, sum to `p`. It samples one of them in
    proportion to their probabilities.

    Args:
        p: Total probability of the set, in (0, 1]. A number, or a list with one value per row.
            Defaults to 0.1.
        k: Number of most likely tokens to keep first. Their probabilities are normalized before
            `p` applies. An integer, or a list with one value per row. `None` keeps all tokens.
        seed: Same as in `Sampler`.
        temperature: Same as in `Sampler`.

    Raises:
        ValueError: If an argument is out of range.

    Example:

    ```python
    import keras_gemma

    lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
    lm.compile(sampler=keras_gemma.samplers.TopPSampler(p=0.9, seed=0))
    print(lm.generate("ROMEO:", max_new_tokens=20))
    ```
    """

    p: Numbers = 0.1
    k: int | Sequence[int] | None = None
    seed: Seeds = None
    temperature: Numbers = 1.0
    _argument_names: ClassVar[dict[str, str]] = {"top_p": "p", "top_k": "k"}

    def settings(self) -> dict[str, Numbers]:
        limits = {"top_p": self.p} if self.k is None else {"top_p": self.p, "top_k": self.k}
        return super().settings() | limits

"""Top-k sampling (Fan et al., 2018, arXiv:1805.04833)."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import keras

from keras_gemma.generation.samplers.random import DrawingSampler
from keras_gemma.generation.samplers.sampler import Numbers, Seeds


@keras.saving.register_keras_serializable(package="keras_gemma")
@dataclasses.dataclass(frozen=True)
class TopKSampler(DrawingSampler):
    """Samples from the k most likely tokens.

    Top-k sampling (Fan et al., 2018, arXiv:1805.04833) samples one of the k most likely tokens in
    proportion to their probabilities. Tokens as likely as the k-th one are kept too.

    Args:
        k: Number of most likely tokens. An integer, or a list with one value per row. Defaults
            to 5.
        seed: Same as in `Sampler`.
        temperature: Same as in `Sampler`.

    Raises:
        ValueError: If an argument is out of range.

    Example:

    ```python
    import keras_gemma

    lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
    lm.compile(sampler=keras_gemma.samplers.TopKSampler(k=10, seed=0))
    print(lm.generate("ROMEO:", max_new_tokens=20))
    ```
    """

    k: int | Sequence[int] = 5
    seed: Seeds = None
    temperature: Numbers = 1.0
    _argument_names: ClassVar[dict[str, str]] = {"top_k": "k"}

    def settings(self) -> dict[str, Numbers]:
        return super().settings() | {"top_k": self.k}

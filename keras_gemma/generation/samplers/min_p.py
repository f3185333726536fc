"""Min-p sampling (Nguyen et al., 2024, arXiv:2407.01082)."""

import dataclasses

import keras

from keras_gemma.generation.samplers.random import DrawingSampler
from keras_gemma.generation.samplers.sampler import Numbers, Seeds


@keras.saving.register_keras_serializable(package="keras_gemma")
@dataclasses.dataclass(frozen=True)
class MinPSampler(DrawingSampler):
    """Samples from the tokens that are not much less likely than the most likely one.

    Min-p sampling (Nguyen et al., 2024, arXiv:2407.01082) keeps the tokens whose probability is at
    least `min_p * max(probabilities)`, after `temperature` is applied. It samples one of them in
    proportion to their probabilities.

    Args:
        min_p: Minimum probability of a token, relative to the most likely one, in (0, 1]. A
            number, or a list with one value per row. Defaults to 0.05.
        seed: Same as in `Sampler`.
        temperature: Same as in `Sampler`.

    Raises:
        ValueError: If an argument is out of range.

    Example:

    ```python
    import keras_gemma

    lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
    lm.compile(sampler=keras_gemma.samplers.MinPSampler(min_p=0.1, temperature=1.5, seed=0))
    print(lm.generate("ROMEO:", max_new_tokens=20))
    ```
    """

    min_p: Numbers = 0.05
    seed: Seeds = None
    temperature: Numbers = 1.0

    def settings(self) -> dict[str, Numbers]:
        return super().settings() | {"min_p": self.min_p}

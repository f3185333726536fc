"""Greedy decoding."""

import dataclasses
from collections.abc import Hashable
from typing import Any

import keras

from keras_gemma.generation.samplers.sampler import Numbers, Sampler, Seeds, first_argmax


@keras.saving.register_keras_serializable(package="keras_gemma")
@dataclasses.dataclass(frozen=True)
class GreedySampler(Sampler):
    """Chooses the most likely token, `argmax(logits)`.

    Args:
        temperature: Not used. Accepted by all samplers.
        seed: Not used. Accepted by all samplers.

    Example:

    ```python
    import keras_gemma

    lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
    lm.compile(sampler=keras_gemma.samplers.GreedySampler())
    print(lm.generate("ROMEO:", max_new_tokens=20))
    ```
    """

    temperature: Numbers = 1.0
    seed: Seeds = None

    def rule(self) -> Hashable:
        return "greedy"

    def choose(self, logits: Any, state: dict[str, Any]) -> Any:
        return first_argmax(logits)

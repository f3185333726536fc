"""Settings of beam search. The search itself is in `generation/strategies/beam.py`."""

import dataclasses
from collections.abc import Hashable
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops

from keras_gemma import backend
from keras_gemma.checks import check_bool, check_integer, check_numbers
from keras_gemma.generation.samplers.sampler import Numbers, Sampler, Seeds


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

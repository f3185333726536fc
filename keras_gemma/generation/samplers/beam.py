"""Beam search: the likeliest text, as far as a few texts side by side can find it.

What may be set; the search itself is `generation/beam.py`.
"""

import dataclasses
from collections.abc import Hashable
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops

from keras_gemma.generation.samplers.random import check_k
from keras_gemma.generation.samplers.sampler import Numbers, Sampler, Seeds, check_numbers


@keras.saving.register_keras_serializable(package="keras_gemma")
@dataclasses.dataclass(frozen=True)
class BeamSampler(Sampler):
    """Keeps the `num_beams` best texts of each prompt in the running, and returns the best.

    The score of a text is the sum of its new tokens' log-probabilities, divided by their number
    to the power of `length_penalty`. A text that has ended keeps its score and stays in the running
    until better ones push it out. It has no use for a seed, and works neither in `stream` nor with
    `stop` strings.

    Args:
        num_beams: texts in the running; one is greedy.
        return_all_beams: return all of them, best first: a list for each prompt. Without it,
            `num_return_sequences` returns the best so many. With `return_logprobs` each comes with
            its `score`.
        length_penalty: 0, as in KerasHub, looks for the likeliest text, which tends to be a short
            one; 1 compares the means over the tokens, and more favours long texts.
        temperature: divides the logits, of which the probabilities are made.

    Raises:
        ValueError: a setting out of range.

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

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        super().check()
        if isinstance(self.num_beams, list | tuple | np.ndarray):
            raise ValueError(
                "`num_beams` must be one integer for all prompts. "
                f"Received: num_beams={self.num_beams!r}"
            )
        check_k(self.num_beams, "num_beams")
        if not isinstance(self.return_all_beams, bool):
            raise ValueError(
                "`return_all_beams` must be True or False. "
                f"Received: return_all_beams={self.return_all_beams!r}"
            )
        check_numbers("length_penalty", self.length_penalty, "a number", lambda x: abs(x) < 1e3)

    def rule(self) -> Hashable:
        return "beam", self.num_beams

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"length_penalty": np.asarray(self.length_penalty, "float32")}

    @property
    def sequences(self) -> int:
        """Texts for each prompt where `num_return_sequences` says nothing."""
        return self.num_beams if self.return_all_beams else 1

    def init(self, batch: int, seed: Seeds = None, copies: Any = None) -> dict[str, Any]:
        """The state before the first choice, for `batch` rows, `num_beams` to a prompt.

        Before it the beams of a prompt are equal, so all but one start out impossible.
        """
        first = np.arange(batch) % self.num_beams == 0
        return super().init(batch, seed, copies) | {
            "total": ops.convert_to_tensor(np.where(first, 0.0, -np.inf).astype("float32")),
            "count": ops.zeros(batch, dtype="int32"),
        }

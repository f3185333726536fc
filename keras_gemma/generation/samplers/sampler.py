"""What every sampler is: a rule from logits to ids.

The rule is compiled; its settings and its randomness travel in a state of arrays, so another
temperature or seed compiles nothing.
"""

import dataclasses
import random
from collections.abc import Hashable
from typing import Any

import numpy as np
from keras import ops

from keras_gemma.generation.noise import gumbel


class Sampler:
    """A rule that chooses the next token.

    For a rule of your own, override `get_next_token`, as in KerasHub, or `choose`.

    Args:
        temperature: divides the logits; above 1 is livelier, 0 is greedy.
        seed: an integer makes every call repeat; None draws a new one each call, from Python's
            generator, so `keras.utils.set_random_seed` repeats a program.

    Example:

    ```python
    class Second(keras_gemma.samplers.Sampler):
        def get_next_token(self, probabilities):  # [B, V] -> [B]
            return keras.ops.top_k(probabilities, 2)[1][:, 1]

    lm.compile(sampler=Second())
    ```
    """

    temperature: float = 1.0
    seed: int | None = None

    def __init__(self, temperature: float = 1.0, seed: int | None = None) -> None:
        self.temperature = temperature
        self.seed = seed
        self.check()

    def check(self) -> None:
        """Raise a ValueError where a setting is out of range."""
        value = self.temperature
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
            raise ValueError(
                f"`temperature` must be a number >= 0. Received: temperature={value!r}"
            )
        if self.seed is not None and (isinstance(self.seed, bool) or not _is_integer(self.seed)):
            raise ValueError(f"`seed` must be an integer or None. Received: seed={self.seed!r}")

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments. A class of your own adds those that it adds."""
        if dataclasses.is_dataclass(self):
            return dataclasses.asdict(self)
        return {"temperature": self.temperature, "seed": self.seed}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Sampler":
        return cls(**config)

    def structure(self) -> Hashable:
        """What of the sampler is compiled in. The rule of an own class may hold anything."""
        return self

    def settings(self) -> dict[str, float]:
        """The numbers that are not compiled in, by name; `choose` finds them in the state."""
        return {"temperature": self.temperature}

    def init(self, batch: int, seed: int | None = None) -> dict[str, Any]:
        """The state before the first choice, for `batch` rows.

        Args:
            batch: B.
            seed: instead of the sampler's own.
        """
        seed = self.seed if seed is None else seed
        if seed is None:
            seed = random.getrandbits(32)
        state = {name: np.float32(value) for name, value in self.settings().items()}
        state["seed"] = np.uint32(int(seed) % 2**32).astype("int32")
        state["rows"] = np.arange(batch, dtype="int32")
        state["step"] = np.zeros(batch, dtype="int32")
        return {name: ops.convert_to_tensor(value) for name, value in state.items()}

    def __call__(self, logits: Any, state: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """`(logits [B, V], state)` -> `(ids int32 [B], state)`."""
        ids = ops.cast(self.choose(ops.cast(logits, "float32"), state), "int32")
        return ids, {**state, "step": state["step"] + 1}

    def choose(self, logits: Any, state: dict[str, Any]) -> Any:
        """The ids `[B]` for float32 `logits [B, V]`."""
        return self.get_next_token(ops.softmax(tempered(logits, state), axis=-1))

    def get_next_token(self, probabilities: Any) -> Any:
        """The ids `[B]` for `probabilities [B, V]`: for subclasses to override."""
        raise TypeError(
            f"{type(self).__name__} says nothing of how to choose a token. Override "
            "`get_next_token(probabilities)`, or use one of the samplers that are there."
        )


def tempered(logits: Any, state: dict[str, Any]) -> Any:
    """Logits divided by the temperature; 0 leaves the largest alone in the running."""
    return logits / ops.maximum(state["temperature"], 1e-6)


def draw(logits: Any, state: dict[str, Any]) -> Any:
    """A token `[B]` from `softmax(logits [B, V])`, by the state's seed, row and step.

    At temperature 0 it is the first of the largest, as greedy takes it.
    """
    noise = gumbel(state["seed"], state["rows"], state["step"], logits.shape[-1])
    noise = ops.where(state["temperature"] > 0, noise, 0.0)
    return ops.argmax(logits + noise, axis=-1)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer)

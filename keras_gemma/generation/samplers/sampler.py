"""What every sampler is: a rule from logits to ids.

The rule is compiled; its settings and its randomness travel in a state of arrays, one value a row,
so another temperature or seed compiles nothing, and the rows of a batch may differ in them.
"""

import dataclasses
import random
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops

from keras_gemma.generation.samplers.noise import gumbel

Numbers = float | Sequence[float]
"""A setting: one for all rows, or one a row."""

Seeds = int | Sequence[int] | None

LogitsProcessor = Callable[[Any, Any], Any]
"""`(ids int32 [B, S], logits float32 [B, V]) -> logits`. Ids are -1 after the text of each row."""

CALL = 1 << 16
"""How far apart the numbers of two calls begin, in a generator of Keras's."""


class Sampler:
    """A rule that chooses the next token.

    For a rule of your own, override `get_next_token`, as in KerasHub, or `choose`.

    Args:
        temperature: divides the logits; above 1 is livelier, 0 is greedy. A list has one value
            for each row of the batch.
        seed: an integer makes every call repeat, a list has one a row; None draws a new one each
            call, from Python's generator, so `keras.utils.set_random_seed` repeats a program.

    Example:

    ```python
    import keras_gemma
    import keras

    class Second(keras_gemma.samplers.Sampler):
        def get_next_token(self, probabilities):  # [B, V] -> [B]
            return keras.ops.top_k(probabilities, 2)[1][:, 1]

    lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
    lm.compile(sampler=Second())
    ```
    """

    strategy: ClassVar[str] = "sample"
    """Decoding strategy: `"sample"`, `"beam"` or `"contrastive"`."""
    temperature: Numbers = 1.0
    seed: Seeds = None
    written: ClassVar[dict[str, str]] = {}
    """Settings that a user writes by another name."""

    def __init__(self, temperature: Numbers = 1.0, seed: Seeds = None) -> None:
        self.temperature = temperature
        self.seed = seed
        self.check()

    def check(self) -> None:
        """Raise a ValueError where a setting is out of range."""
        check_numbers("temperature", self.temperature, "a number >= 0", lambda x: 0 <= x < 1e9)
        if self.seed is not None:
            check_seed(self.seed)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments. A class of your own adds those that it adds."""
        if dataclasses.is_dataclass(self):
            return dataclasses.asdict(self)
        return {"temperature": self.temperature, "seed": self.seed}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Sampler":
        return cls(**config)

    def structure(self) -> Hashable:
        """What of the sampler is compiled in: of a class of your own, which may hold anything, all.

        Such an object must not change once it has been used.
        """
        return self if self.is_own() else self.rule()

    def is_own(self) -> bool:
        """Whether it is of a class of a user's own, also one that builds on a sampler here."""
        return not type(self).__module__.startswith(__package__)

    def rule(self) -> Hashable:
        """What of the samplers here is compiled in."""
        return self

    def settings(self) -> dict[str, Numbers]:
        """The numbers that are not compiled in, by name; `choose` finds them in the state."""
        return {"temperature": self.temperature}

    def check_rows(self, prompts: int) -> None:
        """Raise a ValueError where a list has another length than there are prompts."""
        for name, value in self.settings().items():
            check_rows(self.written.get(name, name), value, prompts)

    def init(self, batch: int, seed: Seeds = None, copies: Any = None) -> dict[str, Any]:
        """The state before the first choice, for `batch` rows.

        Args:
            batch: B.
            seed: instead of the sampler's own.
            copies: int `[B]`, tells rows of one seed apart; by default each differs.
        """
        state = {name: _by_row(name, value, batch) for name, value in self.settings().items()}
        seeds = self.seed if seed is None else check_seed(seed)
        if seeds is None:
            seeds = random.getrandbits(32)
        words = [int(value) % 2**32 for value in np.ravel(np.array(seeds, object))]
        state["seed"] = _by_row("seed", np.array(words, "uint32"), batch).view("int32")
        state["rows"] = np.array(range(batch) if copies is None else copies, "int32")
        state["step"] = np.zeros(batch, dtype="int32")
        state = {name: ops.convert_to_tensor(value) for name, value in state.items()}
        generators = self._seed_generators()
        if generators:
            state["generators"] = self._begin(generators, words[0] if seed is not None else None)
        return state

    def _begin(self, generators: list[keras.random.SeedGenerator], seed: int | None) -> list[Any]:
        """The states of Keras's generators: those of `seed`, or where they are."""
        if seed is not None:
            pairs = [np.array([(seed + i) % 2**32, 0]) for i in range(len(generators))]
            return [
                ops.convert_to_tensor(pair, dtype=g.state.dtype)
                for pair, g in zip(pairs, generators, strict=True)
            ]
        values = [ops.copy(g.state.value) for g in generators]
        for g in generators:  # the next call goes on behind what this one may use
            g.state.assign(g.state.value + ops.cast(np.array([0, CALL]), g.state.dtype))
        return values

    def __call__(self, logits: Any, state: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """`(logits [B, V], state)` -> `(ids int32 [B], state)`."""
        logits = ops.cast(logits, "float32")
        after = {**state, "step": state["step"] + 1}
        if not self._has_own_rule():
            return ops.cast(self.choose(logits, state), "int32"), after
        generators = self._seed_generators()
        values = state["generators"] if generators else []
        pairs = [(g.state, value) for g, value in zip(generators, values, strict=True)]
        with keras.StatelessScope(state_mapping=pairs) as scope:
            ids = self.get_next_token(ops.softmax(tempered(logits, state), axis=-1))
        if generators:
            after["generators"] = [scope.get_current_value(g.state) for g in generators]
        return ops.cast(ids, "int32"), after

    def _has_own_rule(self) -> bool:
        return type(self).get_next_token is not Sampler.get_next_token

    def _seed_generators(self) -> list[keras.random.SeedGenerator]:
        """Keras's generators that a rule of one's own draws from, as KerasHub's do."""
        return [v for v in vars(self).values() if isinstance(v, keras.random.SeedGenerator)]

    def choose(self, logits: Any, state: dict[str, Any]) -> Any:
        """The ids `[B]` for float32 `logits [B, V]`."""
        raise TypeError(
            f"{type(self).__name__} says nothing of how to choose a token. Override "
            "`get_next_token(probabilities)`, or use one of the samplers that are there."
        )

    def get_next_token(self, probabilities: Any) -> Any:
        """The ids `[B]` for `probabilities [B, V]`: what a subclass overrides."""
        return ops.argmax(probabilities, axis=-1)


def tempered(logits: Any, state: dict[str, Any]) -> Any:
    """Logits divided by the temperature; 0 leaves the largest alone in the running."""
    return logits / ops.maximum(state["temperature"], 1e-6)[:, None]


def draw(logits: Any, state: dict[str, Any]) -> Any:
    """A token `[B]` from `softmax(logits [B, V])`, by the state's seed, row and step.

    At temperature 0 it is the first of the largest, as greedy takes it.
    """
    noise = gumbel(state["seed"], state["rows"], state["step"], logits.shape[-1])
    noise = ops.where(state["temperature"][:, None] > 0, noise, 0.0)
    return likeliest(logits + noise)


def likeliest(logits: Any) -> Any:
    """The first of the largest of `logits [B, V]`, int32 `[B]`.

    Not by `argmax`: XLA on CPU makes that one serial loop, of a millisecond for 256,000 logits.
    """
    last = logits.shape[-1] - 1
    largest = logits == ops.max(logits, axis=-1, keepdims=True)
    return ops.min(ops.where(largest, ops.arange(last + 1, dtype="int32"), last), axis=-1)


def _by_row(name: str, value: Any, batch: int) -> np.ndarray:
    """`value` as an array `[B]`: one a row, or of each prompt, for all its copies."""
    value = np.ravel(np.asarray(value))
    if name != "seed":
        value = value.astype("int32" if name == "top_k" else "float32")
    if batch % len(value):
        raise ValueError(
            f"`{name}` must be one value, or one for each of the {batch} rows. "
            f"Received: {len(value)} values"
        )
    return np.repeat(value, batch // len(value))


def check_rows(name: str, value: Any, prompts: int) -> None:
    """Raise a ValueError where `value` is a list of another length than there are prompts."""
    if np.ndim(value) and len(value) != prompts:
        raise ValueError(
            f"`{name}` must be one value, or one for each prompt. "
            f"Received: {len(value)} values for {prompts} prompts"
        )


def check_numbers(
    name: str, value: Any, what: str, fits: Callable[[Any], bool], whole: bool = False
) -> None:
    """Raise a ValueError where `value` is no number that fits, nor a list of such."""
    kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
    many = isinstance(value, list | tuple | np.ndarray) and np.shape(value) != ()
    values = value if many else [np.asarray(value)[()] if isinstance(value, np.ndarray) else value]
    good = [isinstance(v, kinds) and not isinstance(v, bool) and fits(v) for v in values]
    if not good or not all(good):
        raise ValueError(
            f"`{name}` must be {what}, or a list of one for each row. Received: {name}={value!r}"
        )


def check_seed(seed: Any) -> Any:
    """`seed`, or a ValueError where it is no integer, nor a list of integers."""
    check_numbers("seed", seed, "an integer", lambda value: True, whole=True)
    return seed

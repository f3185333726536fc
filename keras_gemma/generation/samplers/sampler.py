"""Base class of samplers: a rule that maps logits to token ids.

The rule is compiled. Settings and seeds are arrays in a state, with one value per row. Therefore
the rows of a batch may have different settings, and new settings or seeds do not recompile.
"""

import dataclasses
import random
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops

from keras_gemma import backend
from keras_gemma.checks import check_numbers
from keras_gemma.generation.samplers.loop import Next, Prompt
from keras_gemma.generation.samplers.noise import gumbel

Numbers = float | Sequence[float]
"""Value of a setting: one for all rows, or one per row."""

Seeds = int | Sequence[int] | None

LogitsProcessor = Callable[[Any, Any], Any]
"""`(ids int32 [B, S], logits float32 [B, V]) -> logits`. Ids are -1 after the end of each row."""

CALL_STRIDE = 1 << 16
"""Distance between the counters of two calls in a Keras seed generator, in random draws."""


class Sampler:
    """Base class of samplers.

    For a custom sampler, override `get_next_token`, as in KerasHub.

    Args:
        temperature: Divisor of the logits. Values above 1 make the output more random, and 0 means
            greedy decoding. A number, or a list with one value per row. Defaults to 1.
        seed: Random seed. With a seed, each call gives the same output. An integer, or a list with
            one value per row. `None` takes a new seed for each call from Python's `random`, which
            `keras.utils.set_random_seed` makes repeatable.

    Raises:
        ValueError: If an argument is out of range.

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
    _argument_names: ClassVar[dict[str, str]] = {}
    """Names of constructor arguments, by the settings that have another name."""

    def __init__(self, temperature: Numbers = 1.0, seed: Seeds = None) -> None:
        self.temperature = temperature
        self.seed = seed
        self.check()

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Checks the settings.

        Raises:
            ValueError: If a setting is out of range.
        """
        check_numbers("temperature", self.temperature, "[0, 1e9)")
        check_seed(self.seed)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments. A subclass adds its arguments to them."""
        if dataclasses.is_dataclass(self):
            return dataclasses.asdict(self)
        return {"temperature": self.temperature, "seed": self.seed}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Sampler":
        return cls(**config)

    def structure(self) -> Hashable:
        """Returns the part of the sampler that is compiled in, as a key of compiled programs.

        A custom sampler is compiled in as a whole, and must not change after its first use.
        """
        return self if self.is_custom else self.rule()

    @property
    def is_custom(self) -> bool:
        """True if the class is defined outside this package."""
        return not type(self).__module__.startswith(__package__)

    @property
    def is_greedy(self) -> bool:
        """True if the sampler always takes the most likely token."""
        return self.structure() == "greedy"

    @property
    def has_known_probabilities(self) -> bool:
        """True if the sampler is greedy, or draws from a distribution that it filters."""
        structure = self.structure()
        return self.is_greedy or (isinstance(structure, tuple) and structure[0] == "draw")

    @property
    def num_return_sequences(self) -> int:
        """Default number of sequences per prompt."""
        return 1

    def rule(self) -> Hashable:
        """Returns the compiled-in part of a sampler of this package."""
        return self

    def settings(self) -> dict[str, Numbers]:
        """Returns the settings that are not compiled in. `choose` reads them from the state."""
        return {"temperature": self.temperature}

    def check_rows(self, prompts: int) -> None:
        """Checks that each setting has one value, or one per prompt.

        Raises:
            ValueError: If a list has another length.
        """
        for name, value in self.settings().items():
            check_rows(self._argument_names.get(name, name), value, prompts)

    def init(self, batch: int, seed: Seeds = None, row_keys: Any = None) -> dict[str, Any]:
        """Returns the initial state of `batch` rows: arrays `[B]` by name.

        Args:
            batch: Number of rows, B.
            seed: Random seed of this call. `None` uses the seed of the sampler.
            row_keys: Numbers that distinguish rows with the same seed, int32 `[B]`.
                `None` numbers the rows.
        """
        state = {name: _by_row(name, value, batch) for name, value in self.settings().items()}
        seeds = self.seed if seed is None else seed
        if seeds is None:
            seeds = random.getrandbits(32)
        words = [int(value) % 2**32 for value in np.ravel(np.array(seeds, object))]
        state["seed"] = _by_row("seed", np.array(words, "uint32"), batch).view("int32")
        rows = range(batch) if row_keys is None else row_keys
        state["rows"] = np.array(rows, "int32")
        state["step"] = np.zeros(batch, dtype="int32")
        state = {name: backend.to_tensor(value) for name, value in state.items()}
        generators = self._seed_generators()
        if generators:
            state["generators"] = _generator_states(generators, None if seed is None else words[0])
        return state

    def __call__(
        self,
        next: Next,
        prompt: Any,
        cache: Any = None,
        index: Any = 0,
        mask: Any = None,
        stop_token_ids: Sequence[int] | None = None,
        hidden_states: Any = None,
        model: Any = None,
    ) -> Any:
        """Decodes with a function that returns logits, as in KerasHub. `generate` does not use it.

        Args:
            next: Function `(prompt, cache, index) -> (logits [B, V], hidden states [B, D], cache)`,
                where the logits are those of the token at `index`. For search with several
                candidates, B is larger than that of `prompt`.
            prompt: Token ids `[B, T]`, with any ids from `index` on.
            cache: Any structure of arrays `[B, ...]`, or `None`. Defaults to `None`.
            index: First position to decode. Defaults to 0.
            mask: bool `[B, T]`, True at tokens that are kept. `None` replaces all from `index` on.
            stop_token_ids: Ids that end a row where `mask` is False. The remaining tokens of
                the row stay as they are. `None` decodes all T tokens.
            hidden_states: Hidden states of the prompt, `[B, T, D]`, for contrastive search.
            model: Ignored. KerasHub reads the variables of the model from it.

        Returns:
            The token ids `[B, T]`. A `BeamSampler` with `return_all_beams` returns the ids of all
            beams, `[B, beams, T]`, and their scores, float32 `[B, beams]`, best first.

        Raises:
            ValueError: If `hidden_states` are needed and missing.
        """
        tokens = ops.convert_to_tensor(prompt, dtype="int32")
        rules = Prompt(tokens, mask, stop_token_ids)
        cache = () if cache is None else cache
        return self.decode(next, rules, tokens, cache, index, hidden_states)

    def decode(
        self, next: Next, prompt: Prompt, tokens: Any, cache: Any, index: Any, hidden_states: Any
    ) -> Any:
        """Decodes `tokens [B, T]` as `__call__` says."""

        def body(index: Any, tokens: Any, cache: Any, state: Any) -> tuple[Any, Any, Any]:
            logits, _, cache = next(tokens, cache, index)
            ids, state = self.choose_next(logits, state)
            return prompt.write(tokens, index, ids), cache, state

        return prompt.loop(body, index, tokens, cache, self.init(tokens.shape[0]))[0]

    def choose_next(self, logits: Any, state: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Returns the next ids, int32 `[B]`, and the next state, for `logits [B, V]`."""
        logits = ops.cast(logits, "float32")
        after = {**state, "step": state["step"] + 1}
        if type(self).get_next_token is Sampler.get_next_token:
            return ops.cast(self.choose(logits, state), "int32"), after
        generators = self._seed_generators()
        values = state["generators"] if generators else []
        pairs = [(g.state, value) for g, value in zip(generators, values, strict=True)]
        with keras.StatelessScope(state_mapping=pairs) as scope:
            ids = self.get_next_token(ops.softmax(tempered(logits, state), axis=-1))
        if generators:
            after["generators"] = [scope.get_current_value(g.state) for g in generators]
        return ops.cast(ids, "int32"), after

    def _seed_generators(self) -> list[keras.random.SeedGenerator]:
        """Returns the Keras seed generators among the attributes, as KerasHub's samplers have."""
        return [v for v in vars(self).values() if isinstance(v, keras.random.SeedGenerator)]

    def choose(self, logits: Any, state: dict[str, Any]) -> Any:
        """Returns the next ids `[B]` for float32 `logits [B, V]`.

        Raises:
            TypeError: If a subclass overrides neither this method nor `get_next_token`.
        """
        raise TypeError(
            f"{type(self).__name__} does not define how to choose a token. Override "
            "`get_next_token(probabilities)`, or use a sampler of `keras_gemma.samplers`."
        )

    def get_next_token(self, probabilities: Any) -> Any:
        """Returns the next ids `[B]` for `probabilities [B, V]`. Custom samplers override this."""
        return ops.argmax(probabilities, axis=-1)


def _generator_states(generators: list[keras.random.SeedGenerator], seed: int | None) -> list[Any]:
    """Returns the states of Keras generators for one call, from `seed` or their own."""
    if seed is not None:
        return [
            ops.convert_to_tensor(np.array([(seed + i) % 2**32, 0]), dtype=generator.state.dtype)
            for i, generator in enumerate(generators)
        ]
    states = [ops.copy(generator.state.value) for generator in generators]
    for state in (generator.state for generator in generators):
        # The next call begins after the draws of this one.
        state.assign(state.value + ops.cast(np.array([0, CALL_STRIDE]), state.dtype))
    return states


def tempered(logits: Any, state: dict[str, Any]) -> Any:
    """Returns `logits [B, V]` divided by the temperature. Zero is replaced by a tiny value."""
    return logits / ops.maximum(state["temperature"], 1e-6)[:, None]


def draw(logits: Any, state: dict[str, Any]) -> Any:
    """Samples ids `[B]` from `softmax(logits [B, V])`, with the state's seed, row and step.

    Uses the Gumbel-max trick. At temperature 0, returns the same ids as greedy decoding.
    """
    tokens = ops.arange(logits.shape[-1], dtype="int32")[None]
    return first_argmax(logits + noise_of(tokens, state))


def noise_of(tokens: Any, state: dict[str, Any]) -> Any:
    """Returns the noise for the draw of `tokens [1 or B, n]`, float32 `[B, n]`.

    It is zero in rows with a temperature of 0.
    """
    noise = gumbel(state["seed"], state["rows"], state["step"], tokens)
    return ops.where(state["temperature"][:, None] > 0, noise, 0.0)


def first_argmax(logits: Any) -> Any:
    """Returns the first index of the largest of `logits [B, V]`, int32 `[B]`.

    Avoids `argmax`, which XLA on CPU compiles to a serial loop: 1 ms for 256,000 logits.
    """
    last = logits.shape[-1] - 1
    largest = logits == ops.max(logits, axis=-1, keepdims=True)
    return ops.min(ops.where(largest, ops.arange(last + 1, dtype="int32"), last), axis=-1)


def _by_row(name: str, value: Any, batch: int) -> np.ndarray:
    """Returns `value` as an array `[B]`. A value per prompt is repeated for its sequences."""
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
    """Raises a ValueError if `value` is neither one value nor a list of one per prompt."""
    if np.ndim(value) and len(value) != prompts:
        raise ValueError(
            f"`{name}` must be one value, or one for each prompt. "
            f"Received: {len(value)} values for {prompts} prompts"
        )


def check_seed(seed: Any) -> None:
    """Raises a ValueError if `seed` is not an integer, a list of integers or `None`."""
    if seed is not None:
        check_numbers("seed", seed, whole=True)

"""Who guesses the next tokens: a smaller model, or the text itself.

A wrong guess costs time and nothing else: `judging.py` sees to that.
"""

from typing import Any, Protocol

import numpy as np
from keras import ops

from keras_gemma import backend
from keras_gemma.generation.decode import DecodeState, step
from keras_gemma.generation.prefill import to_rings
from keras_gemma.generation.programs import Programs
from keras_gemma.generation.samplers.random import limit
from keras_gemma.generation.samplers.sampler import draw, first_argmax
from keras_gemma.generation.session import Run
from keras_gemma.generation.strategies.verify import GUESSING, Guesses, is_greedy
from keras_gemma.model.cache import Cache, grow_cache, repeat_rows, slots_of_layers

SHORTEST_MATCH, LONGEST_MATCH = 2, 8
"""Tokens at the end of a text that are looked up in it. A single one would nearly always be found
and say little."""


class Guesser(Protocol):
    """Makes guesses."""

    def guess(self, state: DecodeState) -> Guesses:
        """The tokens that may follow the text of `state`."""
        ...


class TextGuesser:
    """Guesses that the text repeats itself: no second model.

    Args:
        tokens: how many to guess at a time.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def guess(self, state: DecodeState) -> Guesses:
        text = ops.convert_to_numpy(state.text)
        lengths, done = ops.convert_to_numpy(state.length), ops.convert_to_numpy(state.done)
        ids = np.full((self.tokens, len(text)), -1, "int32")
        for row in np.flatnonzero(~done):
            found = look_up(text[row, : lengths[row]], self.tokens)
            ids[: len(found), row] = found
        if (ids < 0).all():  # then the model reads one token, as without a draft
            return Guesses()
        return Guesses(tuple(ops.convert_to_tensor(place) for place in ids))


def look_up(text: np.ndarray, count: int) -> np.ndarray:
    """What followed the last time that the text stood as it ends now, int32 `[count]` or `[0]`.

    Of all places the one with the longest match is taken, up to `LONGEST_MATCH` tokens, and the
    latest of these. Where the text that followed ends, it is thought to begin again.

    Args:
        text: int32 `[n]`.

    Example:

    ```python
    import numpy as np
    from keras_gemma.generation.strategies.draft import look_up

    look_up(np.array([5, 6, 7, 8, 5, 6]), 3)  # [7, 8, 5]
    ```
    """
    last = len(text) - 1
    ends = np.flatnonzero(text[:-1] == text[-1])
    for back in range(1, LONGEST_MATCH):
        longer = ends[(ends >= back) & (text[ends - back] == text[last - back])]
        if not len(longer):
            if back < SHORTEST_MATCH:
                return text[:0]
            break
        ends = longer
    start = ends[-1] + 1
    return text[start + np.arange(count) % (len(text) - start)]


class ModelGuesser:
    """Guesses by a smaller model, with a cache of its own.

    Args:
        run: whose text it guesses. The draft reads its prompts.
    """

    def __init__(self, run: Run) -> None:
        request = run.request
        self.tokens = request.draft.tokens
        self.generator: Programs = request.draft.generator
        self.weights = self.generator.backbone.tensors()
        _, cache = self.generator.read(request.prompts, None, self.weights)
        if request.copies > 1:
            cache = [tuple(repeat_rows(a, request.copies) for a in kept) for kept in cache]
        self.cache: Cache = self._rings()(cache, ops.convert_to_tensor(run.lengths.astype("int32")))
        self.program = self._propose(run)

    def guess(self, state: DecodeState) -> Guesses:
        slots = slots_of_layers(self.generator.config, state.text.shape[1], self.tokens)
        self.cache = grow_cache(self.cache, slots)
        state = state._replace(cache=None, log_probabilities=None)
        ids, logits = [], []
        for _ in range(self.tokens + 1):  # the last one reads the last guess, and no more
            self.cache, state, guess, drawn_from = self.program(self.weights, self.cache, state)
            ids.append(guess)
            logits += [] if drawn_from is None else [drawn_from]
        return Guesses(tuple(ids[:-1]), tuple(logits[:-1]))

    def _rings(self) -> Any:
        """The program that makes rings of the prompt's cache."""
        config, slack = self.generator.config, self.tokens

        def rings(cache: Cache, lengths: Any) -> Cache:
            return to_rings(cache, lengths, config, cache[0][0].shape[1], slack)

        return self.generator.program(("rings", slack), lambda: backend.compile(rings))

    def _propose(self, run: Run) -> Any:
        """The program that guesses one token."""
        config, parts = self.generator.config, self.generator.parts
        greedy, processors = is_greedy(run.request.sampler), run.request.processors

        def propose(weights: Any, cache: Cache, state: DecodeState) -> tuple[Any, ...]:
            guess = drawn_from = None

            def choose(logits: Any, settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
                nonlocal guess, drawn_from
                if greedy:
                    ids = first_argmax(logits)
                else:
                    drawn_from = limit(logits, settings)
                    ids = draw(drawn_from, {**settings, "step": settings["step"] + GUESSING})
                    ids = ops.cast(ids, "int32")
                guess = ops.where(state.done, -1, ids)
                return ids, {**settings, "step": settings["step"] + 1}

            cached = state._replace(cache=cache)
            after = step(weights, cached, config, choose, processors, parts)
            return after.cache, after._replace(cache=None), guess, drawn_from

        key = "propose", *run.rules()
        return self.generator.program(key, lambda: backend.compile(propose, donate=1))

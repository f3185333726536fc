"""Speculative decoding: a draft guesses tokens, and the model reads them all at once.

Reading one token and reading five costs nearly the same where memory is the limit. The guesses that
the model accepts become the text, and behind them comes one token of its own:

    text          to be or not
    guesses                    to  be  the  end
    the model                  to  be  ,
    text          to be or not to  be  ,

The text follows the model's own distribution, whatever is guessed (Leviathan et al., 2023,
arXiv:2211.17192): greedy text is the same token for token, up to the rounding of sums, which may
differ by the number of tokens that are read at once.

Knows no text but ids, and not how a prompt is read: that is `Run`'s work, which goes before.
"""

import dataclasses
import math
from typing import Any

import numpy as np
from keras import ops

from keras_gemma import backend
from keras_gemma.generation.decode import DecodeState, proceed
from keras_gemma.generation.request import Prefix, Row
from keras_gemma.generation.session import Run
from keras_gemma.generation.strategies.draft import Guesser, ModelGuesser, TextGuesser
from keras_gemma.generation.strategies.verify import Guesses, follow, is_greedy
from keras_gemma.model.cache import Cache
from keras_gemma.model.transformer import forward_with_cache


class SpeculativeRun:
    """A `Run` that goes on by guesses, with its interface.

    Args:
        run: whose request has a draft, and which has chosen its first tokens.
    """

    def __init__(self, run: Run) -> None:
        draft = run.request.draft
        self.run = run
        self.tokens = draft.tokens
        self.guesser: Guesser = (
            TextGuesser(draft.tokens) if draft.generator is None else ModelGuesser(run)
        )
        self.accepted = np.zeros(len(run.lengths), int)
        self.judged = np.zeros(len(run.lengths), int)

    def go_on(self, limit: int | None = None) -> bool:
        """Choose about `limit` tokens more in each row; by default all that may follow.

        Returns:
            Whether a row is still growing.
        """
        rounds = math.inf if limit is None else math.ceil(limit / (self.tokens + 1))
        while rounds > 0 and self._growing():
            self._round()
            rounds -= 1
        return self._growing()

    def stop(self, rows: np.ndarray) -> None:
        """End those of `rows`, bool `[B]`, that are true."""
        self.run.stop(rows)

    def new_ids(self) -> list[np.ndarray]:
        """The tokens of each row so far."""
        return self.run.new_ids()

    @property
    def prefilled(self) -> int:
        """Tokens of the prompts that were read."""
        return self.run.prefilled

    def prefix(self) -> Prefix:
        """As of `Run`."""
        return self.run.prefix()

    def rows(self) -> list[Row]:
        """What each row got, with the share of guesses that were right."""
        rates = zip(self.accepted, self.judged, strict=True)
        shares = [float(accepted / judged) if judged else None for accepted, judged in rates]
        return [
            dataclasses.replace(row, acceptance_rate=share)
            for row, share in zip(self.run.rows(), shares, strict=True)
        ]

    def _growing(self) -> bool:
        return bool(proceed(self.run.state))

    def _round(self) -> None:
        """Guess, and judge the guesses: at least one token more in each row."""
        run = self.run
        longest = int(ops.convert_to_numpy(run.state.length).max())
        run.make_room(longest + self.tokens + 1)
        guesses = self.guesser.guess(run.state)
        state = run.state._replace(cache=None)
        cache, state, accepted, judged = self._judge()(run.weights, run.state.cache, state, guesses)
        run.state = state._replace(cache=cache)
        self.accepted += ops.convert_to_numpy(accepted)
        self.judged += ops.convert_to_numpy(judged)

    def _judge(self) -> Any:
        """The program that reads the guesses and goes on from there."""
        run, generator = self.run, self.run.generator
        config, parts = generator.config, generator.parts
        greedy, processors = is_greedy(run.request.sampler), run.request.processors

        def judge(weights: Any, cache: Cache, state: DecodeState, guesses: Guesses) -> Any:
            first = ops.take_along_axis(state.text, (state.length - 1)[:, None], axis=1)
            read = [ops.maximum(ids, 0)[:, None] for ids in guesses.ids]
            token_ids = ops.concatenate([first, *read], axis=1)
            places = ops.arange(token_ids.shape[1], dtype="int32")[None]
            positions = (state.length - 1)[:, None] + places
            x, cache = forward_with_cache(weights, token_ids, positions, cache, config, parts)
            logits = parts.head(x, weights["head"], config)
            state, accepted, judged = follow(state, logits, guesses, greedy, processors)
            return cache, state, accepted, judged

        return generator.program(("judge", *run.rules()), lambda: backend.compile(judge, donate=1))

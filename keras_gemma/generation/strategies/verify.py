"""The judge of guesses: which of them become the text, so that it follows the model all the same.

Knows not where guesses come from (`guessing.py`), nor how the model read them (`speculative.py`).
"""

from typing import Any, NamedTuple

from keras import ops

from keras_gemma.backend.reference import LOWEST
from keras_gemma.generation.decode import DecodeState, advance
from keras_gemma.generation.samplers import Sampler
from keras_gemma.generation.samplers.noise import gumbel
from keras_gemma.generation.samplers.random import limit
from keras_gemma.generation.samplers.sampler import LogitsProcessor, draw, first_argmax

GUESSING, JUDGING = 1 << 28, 1 << 29
"""Added to a row's step, which is far smaller, they part the random numbers of a place in the text:
those that guess its token, those that judge the guess, and those that draw the token."""


class Guesses(NamedTuple):
    """What the next tokens of each row may be."""

    ids: tuple[Any, ...] = ()
    """int32 `[B]` for each place; -1 where a row has no guess."""
    logits: tuple[Any, ...] = ()
    """float32 `[B, V]` for each place: what the ids were drawn from; empty where they are sure."""


def follow(
    state: DecodeState,
    logits: Any,
    guesses: Guesses,
    greedy: bool,
    processors: tuple[LogitsProcessor, ...] = (),
) -> tuple[DecodeState, Any, Any]:
    """Put down the guesses that fit, and one token more: place by place, as decoding does.

    Args:
        logits: float32 `[B, T, V]`, what the model says behind the text and behind each of its
            T - 1 guesses.

    Returns:
        The state, and of each row how many guesses were accepted, and how many were looked at,
        int32 `[B]`.
    """
    none = ops.zeros_like(state.length) - 1
    done, following = state.done, ops.logical_not(state.done)
    accepted = judged = ops.zeros_like(state.length)
    for place in range(logits.shape[1]):
        guess = guesses.ids[place] if place < len(guesses.ids) else none
        drawn_from = guesses.logits[place] if place < len(guesses.logits) else None
        state = state._replace(done=ops.logical_not(following))
        state, fits = _next(state, logits[:, place], guess, drawn_from, greedy, processors)
        judged = judged + ops.cast(ops.logical_and(following, guess >= 0), "int32")
        accepted = accepted + ops.cast(ops.logical_and(following, fits), "int32")
        done = ops.where(following, state.done, done)
        following = ops.logical_and(fits, ops.logical_not(state.done))
    return state._replace(done=done), accepted, judged


def _next(
    state: DecodeState,
    logits: Any,
    guess: Any,
    drawn_from: Any,
    greedy: bool,
    processors: tuple[LogitsProcessor, ...],
) -> tuple[DecodeState, Any]:
    """One token more in each row that is not done, and whether it is the guess `[B]`."""
    fits = None
    growing = ops.logical_not(state.done)
    last = ops.take_along_axis(state.text, (state.length - 1)[:, None], axis=1)[:, 0]

    def choose(wanted: Any, settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        nonlocal fits
        if greedy:
            ids = first_argmax(wanted)
            fits = ids == guess
        else:
            ids, fits = judge_draw(limit(wanted, settings), settings, guess, drawn_from)
        fits = ops.logical_and(fits, growing)
        taken = settings["step"] + ops.cast(growing, "int32")
        # A row that has come to its end must not seem to stop, nor to have seen another token.
        return ops.where(growing, ids, last), {**settings, "step": taken}

    return advance(state, logits, choose, processors), fits


def judge_draw(
    limited: Any, settings: dict[str, Any], guess: Any, drawn_from: Any
) -> tuple[Any, Any]:
    """A token drawn from p, by way of a guess drawn from q (Leviathan et al., 2.3).

    The guess x is accepted with probability min(1, p(x) / q(x)); else a token is drawn from what
    p has more than q. Without a guess, q is nothing, and the token is drawn as decoding draws it.

    Args:
        limited: float32 `[B, V]`, the logits of p.
        settings: of the sampler, `[B]` each.
        guess: int32 `[B]`, -1 for none.
        drawn_from: the logits of q; None where the guess was certain.

    Returns:
        The ids, int32 `[B]`, and whether they are the guesses, bool `[B]`.
    """
    p = probabilities(limited, settings)
    here = ops.arange(p.shape[-1], dtype="int32")[None] == guess[:, None]
    if drawn_from is None:
        q = ops.cast(here, "float32")
    else:
        q = ops.where(guess[:, None] >= 0, probabilities(drawn_from, settings), 0.0)
    step = settings["step"] + JUDGING
    noise = gumbel(settings["seed"], settings["rows"], step, 1)[:, 0]
    uniform = ops.exp(-ops.exp(-noise))
    q_of_guess = ops.sum(ops.where(here, q, 0.0), axis=-1)
    p_of_guess = ops.sum(ops.where(here, p, 0.0), axis=-1)
    fits = ops.logical_and(guess >= 0, uniform * q_of_guess <= p_of_guess)
    rest = ops.maximum(p - q, 0.0)
    rest = ops.where(rest > 0, ops.log(rest), LOWEST)
    return ops.where(fits, guess, ops.cast(draw(rest, settings), "int32")), fits


def probabilities(limited: Any, settings: dict[str, Any]) -> Any:
    """Of logits `[B, V]`; at temperature 0 all of it is the likeliest's."""
    tokens = ops.arange(limited.shape[-1], dtype="int32")[None]
    sure = ops.cast(tokens == first_argmax(limited)[:, None], "float32")
    return ops.where(settings["temperature"][:, None] > 0, ops.softmax(limited, axis=-1), sure)


def is_greedy(sampler: Sampler) -> bool:
    """Whether it takes the likeliest token, always."""
    return sampler.structure() == "greedy"

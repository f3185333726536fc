"""Beam search: the best texts of each prompt go on side by side.

    beams of one prompt    candidates of each       the best of all, as the next beams
    to be   -1.2           to be or    -1.5         to be or    -1.5
    to die. -1.9           to be that  -3.8         to die.     -1.9

`to die.` has ended: it is its own one candidate. Rows are prompts x beams. A prompt is read once;
from then on each beam has a cache, which moves with it from row to row, inside the compiled step.
"""

import dataclasses
from typing import Any

import numpy as np
from keras import ops

from keras_gemma import backend
from keras_gemma.generation.decode import (
    DecodeState,
    advance,
    proceed,
    process,
)
from keras_gemma.generation.memory import check_memory
from keras_gemma.generation.prefill import to_rings
from keras_gemma.generation.programs import Programs
from keras_gemma.generation.request import Request, Row
from keras_gemma.generation.samplers.sampler import LogitsProcessor, tempered
from keras_gemma.generation.session import Run
from keras_gemma.model.transformer import forward_with_cache


def search(generator: Programs, request: Request) -> list[Row]:
    """The best `request.copies` beams of each prompt, best first.

    Args:
        generator: whose model and programs are used.
        request: with a `BeamSampler`.

    Raises:
        ValueError: more copies than beams, prompts that leave no room, too little memory.
    """
    beams, copies = request.sampler.num_beams, request.copies
    if copies > beams:
        raise ValueError(
            "`num_return_sequences` must be at most `num_beams`: beam search finds no more texts. "
            f"Received: num_return_sequences={copies}, num_beams={beams}"
        )
    request = dataclasses.replace(request, copies=beams)
    request.check(generator.config)
    check_memory(request, generator.config, generator.backbone.compute_dtype, moves=True)
    run = BeamRun(generator, request)
    run.go_on()
    return [row for i, row in enumerate(run.rows()) if i % beams < copies]


class BeamRun(Run):
    """A beam search in progress; its request has as many copies as there are beams."""

    def _begin(self, capacity: int) -> Any:
        """The program that makes rings of the prompt's cache and chooses the first tokens."""
        generator, processors = self.generator, self.request.processors
        config, parts, beams = generator.config, generator.parts, self.request.copies

        def begin(weights: Any, hidden: Any, state: DecodeState) -> DecodeState:
            cache = to_rings(state.cache, state.length, config, state.text.shape[1])
            logits = parts.head(hidden, weights["head"], config)
            return keep_best(state._replace(cache=cache), logits, beams, processors)

        return generator.program(("begin", *self.rules()), lambda: backend.compile(begin))

    def _loop(self) -> Any:
        """The program that chooses the others."""
        generator, processors = self.generator, self.request.processors
        config, parts, beams = generator.config, generator.parts, self.request.copies

        def turn(weights: Any, state: DecodeState) -> DecodeState:
            position = (state.length - 1)[:, None]
            token = ops.take_along_axis(state.text, position, axis=1)
            x, cache = forward_with_cache(weights, token, position, state.cache, config, parts)
            logits = parts.head(x[:, 0], weights["head"], config)
            return keep_best(state._replace(cache=cache), logits, beams, processors)

        return generator.program(("step", *self.rules()), lambda: backend.while_loop(proceed, turn))

    def rows(self) -> list[Row]:
        """What each beam got; those of a prompt stand together, best first."""
        of = self.state.sampler
        scores = ops.convert_to_numpy(score(of["total"], of["count"], of["length_penalty"]))
        return [
            dataclasses.replace(row, score=float(of_row))
            for row, of_row in zip(super().rows(), scores, strict=True)
        ]


def keep_best(
    state: DecodeState, logits: Any, beams: int, processors: tuple[LogitsProcessor, ...] = ()
) -> DecodeState:
    """One token more in each beam that has not ended: the best of each prompt go on.

    Args:
        state: rows are prompts x beams; its sampler's state is that of `BeamSampler.init`.
        logits: float32 `[B, V]`, of each row's next token.
        beams: rows of a prompt.
        processors: change the logits before they are made probabilities.
    """
    settings = state.sampler
    rows, vocabulary_size = logits.shape
    width = min(beams, vocabulary_size)
    wanted = tempered(process(logits, state, processors), settings)
    wanted = wanted - ops.logsumexp(wanted, axis=-1, keepdims=True)
    gains, ids = ops.top_k(wanted, width)  # [B, width]: more of one beam cannot be among the best

    # A beam that has ended is a candidate itself, at no cost, and has no other.
    first = ops.arange(width, dtype="int32")[None] == 0
    nothing = ops.where(first, 0.0, -np.inf)
    totals = settings["total"][:, None] + ops.where(state.done[:, None], nothing, gains)
    counts = settings["count"] + ops.cast(ops.logical_not(state.done), "int32")
    scores = score(totals, counts[:, None], settings["length_penalty"][:, None])

    _, best = ops.top_k(ops.reshape(scores, (-1, beams * width)), beams)  # [prompts, beams]
    before = ops.arange(rows // beams, dtype="int32")[:, None] * (beams * width)
    best = ops.reshape(ops.cast(best, "int32") + before, (rows,))
    came_from = best // width
    ids = ops.take(ops.reshape(ops.cast(ids, "int32"), (-1,)), best)
    total = ops.take(ops.reshape(totals, (-1,)), best)

    chosen = {**settings, "total": total, "count": ops.take(counts, came_from)}
    penalty, state = state.penalty, move(state, came_from)._replace(penalty=None)  # it has its due
    if state.log_probabilities is not None:
        logits = ops.take(logits, came_from, axis=0)
    state = advance(state, logits, lambda *_: (ids, chosen))
    # Nobody need wait for what is impossible.
    done = ops.logical_or(state.done, total == -np.inf)
    return state._replace(done=done, penalty=penalty)


def move(state: DecodeState, came_from: Any) -> DecodeState:
    """The state with row `came_from[i]` in the place of row i, both of one prompt."""

    def taken(array: Any) -> Any:
        return None if array is None else ops.take(array, came_from, axis=0)

    records = state.log_probabilities
    return state._replace(
        text=taken(state.text),
        length=taken(state.length),
        done=taken(state.done),
        cache=[(taken(keys), taken(values)) for keys, values in state.cache],
        seen=taken(state.seen),
        log_probabilities=None if records is None else type(records)(*map(taken, records)),
    )


def score(total: Any, count: Any, length_penalty: Any) -> Any:
    """What beams are compared by, the larger the better, as a float32 tensor.

    Args:
        total: of the log-probabilities of a beam's new tokens.
        count: of these tokens, int32.
        length_penalty: float32.
    """
    return total / ops.cast(ops.maximum(count, 1), "float32") ** length_penalty

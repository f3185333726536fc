"""Beam search: keeps the best texts of each prompt.

    beams of one prompt    candidates of each       the best of all, as the next beams
    to be   -1.2           to be or    -1.5         to be or    -1.5
    to die. -1.9           to be that  -3.8         to die.     -1.9

`to die.` has ended, so it is its own only candidate. Rows are prompts x beams. Each prompt is
prefilled once. After that, each beam has a KV cache, which the compiled step moves with it from row
to row.
"""

import dataclasses
from typing import Any

import numpy as np
from keras import ops

from keras_gemma import backend
from keras_gemma.generation.decode import (
    DecodeState,
    any_unfinished,
    apply_logits_processors,
    next_logits,
    write_tokens,
)
from keras_gemma.generation.memory import check_memory
from keras_gemma.generation.prefill import to_rings
from keras_gemma.generation.programs import Programs
from keras_gemma.generation.request import Request, SequenceOutput
from keras_gemma.generation.samplers.sampler import LogitsProcessor, tempered
from keras_gemma.generation.session import DecodingSession


def search(programs: Programs, request: Request) -> list[SequenceOutput]:
    """Returns the best `request.num_return_sequences` beams of each prompt, best first.

    Args:
        programs: Programs of the model.
        request: Request with a `BeamSampler`.

    Raises:
        ValueError: If more sequences than beams are requested, if a prompt leaves no room in the
            context, or if there is not enough memory.
    """
    beams, count = request.sampler.num_beams, request.num_return_sequences
    if count > beams:
        raise ValueError(
            "`num_return_sequences` must be at most `num_beams`. "
            f"Received: num_return_sequences={count}, num_beams={beams}"
        )
    request = dataclasses.replace(request, num_return_sequences=beams)
    request.check(programs.config)
    dtype = programs.backbone.compute_dtype
    check_memory(request, programs.config, dtype, reorders_cache=True)
    session = BeamSession(programs, request)
    session.decode()
    return [output for i, output in enumerate(session.outputs()) if i % beams < count]


class BeamSession(DecodingSession):
    """A beam search in progress. The request has one sequence per beam."""

    def _prefill_program(self, capacity: int) -> Any:
        """Returns the program that fills the ring buffers and chooses the first tokens."""
        programs, processors = self.programs, self.request.logits_processors
        config, parts, beams = programs.config, programs.parts, self.request.num_return_sequences

        def begin(weights: Any, hidden: Any, state: DecodeState) -> DecodeState:
            cache = to_rings(state.cache, state.length, config, state.text.shape[1])
            logits = parts.head(hidden, weights["head"], config)
            return keep_best(state._replace(cache=cache), logits, beams, processors)

        return programs.program(("begin", *self.static_key()), lambda: backend.compile(begin))

    def _decode_program(self) -> Any:
        """Returns the program that runs decode steps."""
        programs, processors = self.programs, self.request.logits_processors
        config, parts, beams = programs.config, programs.parts, self.request.num_return_sequences

        def decode_step(weights: Any, state: DecodeState) -> DecodeState:
            logits, state = next_logits(weights, state, config, parts)
            return keep_best(state, logits, beams, processors)

        key = "step", *self.static_key()
        return programs.program(key, lambda: backend.while_loop(any_unfinished, decode_step))

    def outputs(self) -> list[SequenceOutput]:
        """Returns the output of each beam, with its score, best first for each prompt."""
        beam = self.state.sampler
        scores = score(beam["total"], beam["count"], beam["length_penalty"])
        pairs = zip(super().outputs(), ops.convert_to_numpy(scores), strict=True)
        return [dataclasses.replace(output, score=float(value)) for output, value in pairs]


def keep_best(
    state: DecodeState, logits: Any, beams: int, processors: tuple[LogitsProcessor, ...] = ()
) -> DecodeState:
    """Appends one token to each unfinished beam and keeps the best beams of each prompt.

    Args:
        state: Rows are prompts x beams. `state.sampler` comes from `BeamSampler.init`.
        logits: float32 `[B, V]`, logits of the next token of each row.
        beams: Number of beams per prompt.
        processors: Logits processors, applied before the log-probabilities are computed.
    """
    settings = state.sampler
    rows, vocabulary_size = logits.shape
    width = min(beams, vocabulary_size)
    processed = tempered(apply_logits_processors(logits, state, processors), settings)
    processed = processed - ops.logsumexp(processed, axis=-1, keepdims=True)
    # [B, width], because at most `width` candidates of one beam can be among the best.
    gains, ids = ops.top_k(processed, width)

    # A finished beam is its own only candidate, at no cost.
    first = ops.arange(width, dtype="int32")[None] == 0
    only_itself = ops.where(first, 0.0, -np.inf)
    totals = settings["total"][:, None] + ops.where(state.done[:, None], only_itself, gains)
    counts = settings["count"] + ops.cast(ops.logical_not(state.done), "int32")
    scores = score(totals, counts[:, None], settings["length_penalty"][:, None])

    _, best = ops.top_k(ops.reshape(scores, (-1, beams * width)), beams)  # [prompts, beams]
    offsets = ops.arange(rows // beams, dtype="int32")[:, None] * (beams * width)
    best = ops.reshape(ops.cast(best, "int32") + offsets, (rows,))
    parents = best // width
    ids = ops.take(ops.reshape(ops.cast(ids, "int32"), (-1,)), best)
    total = ops.take(ops.reshape(totals, (-1,)), best)

    sampler = {**settings, "total": total, "count": ops.take(counts, parents)}
    if state.logprobs is not None:
        logits = ops.take(logits, parents, axis=0)
    state = write_tokens(reorder(state, parents)._replace(sampler=sampler), logits, ids)
    # Impossible beams end at once, so that nothing waits for them.
    return state._replace(done=ops.logical_or(state.done, total == -np.inf))


def reorder(state: DecodeState, parents: Any) -> DecodeState:
    """Returns the state with row `parents[i]` as row i. Both rows belong to the same prompt."""

    def rows_of(array: Any) -> Any:
        return None if array is None else ops.take(array, parents, axis=0)

    logprobs = state.logprobs
    return state._replace(
        text=rows_of(state.text),
        length=rows_of(state.length),
        done=rows_of(state.done),
        cache=[(rows_of(keys), rows_of(values)) for keys, values in state.cache],
        seen=rows_of(state.seen),
        logprobs=None if logprobs is None else type(logprobs)(*map(rows_of, logprobs)),
    )


def score(total: Any, count: Any, length_penalty: Any) -> Any:
    """Returns the scores that rank beams, float32; larger is better.

    Args:
        total: Sum of the log-probabilities of a beam's new tokens.
        count: int32, number of these tokens.
        length_penalty: float32, exponent of the number of tokens.
    """
    return total / ops.cast(ops.maximum(count, 1), "float32") ** length_penalty

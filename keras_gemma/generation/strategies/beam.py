"""Beam search: keeps the best texts of each prompt.

    beams of one prompt    candidates of each       the best of all, as the next beams
    to be   -1.2           to be or    -1.5         to be or    -1.5
    to die. -1.9           to be that  -3.8         to die.     -1.9

`to die.` has ended, so it is its own only candidate. Rows are prompts x beams. Each prompt is
prefilled once. After that, each beam has a KV cache, which the compiled step moves with it from row
to row.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops

from keras_gemma.generation.decode import DecodeState, apply_logits_processors, write_tokens
from keras_gemma.generation.memory import check_memory
from keras_gemma.generation.programs import Programs
from keras_gemma.generation.request import Request, SequenceOutput
from keras_gemma.generation.samplers.beam import best_beams, score
from keras_gemma.generation.samplers.sampler import LogitsProcessor
from keras_gemma.generation.session import DecodingSession


def search(programs: Programs, request: Request) -> list[SequenceOutput]:
    """Returns the best `request.num_return_sequences` beams of each prompt, best first."""
    beams, count = request.sampler.num_beams, request.num_return_sequences
    if count > beams:
        raise ValueError(
            "`num_return_sequences` must be at most `num_beams`. "
            f"Received: num_return_sequences={count}, num_beams={beams}"
        )
    request = dataclasses.replace(request, num_return_sequences=beams)
    request.check(programs.config)
    check_memory(request, programs.backbone)
    session = BeamSession(programs, request)
    session.decode()
    return [output for i, output in enumerate(session.outputs()) if i % beams < count]


class BeamSession(DecodingSession):
    """A beam search in progress. The request has one sequence per beam."""

    def _append_function(self) -> Callable[[DecodeState, Any], DecodeState]:
        beams, processors = self.request.num_return_sequences, self.request.logits_processors
        return lambda state, logits: keep_best(state, logits, beams, processors)

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

    The rows of `state` and `logits [B, V]` are prompts x beams.
    """
    processed = apply_logits_processors(logits, state, processors)
    parents, ids, sampler = best_beams(processed, state.done, state.sampler, beams)
    if state.logprobs is not None:
        logits = ops.take(logits, parents, axis=0)
    state = write_tokens(reorder(state, parents)._replace(sampler=sampler), logits, ids)
    # Impossible beams end at once, so that nothing waits for them.
    return state._replace(done=ops.logical_or(state.done, sampler["total"] == -np.inf))


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
        counts=rows_of(state.counts),
        logprobs=None if logprobs is None else type(logprobs)(*map(rows_of, logprobs)),
    )

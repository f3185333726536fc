"""Draft tokens, proposed by a smaller model or copied from the text itself.

A wrong proposal only costs time, because `verify.py` rejects it.
"""

from typing import Any

import numpy as np
from keras import ops

from keras_gemma import backend
from keras_gemma.generation.decode import (
    DecodeState,
    apply_logits_processors,
    next_logits,
    write_tokens,
)
from keras_gemma.generation.prefill import to_rings
from keras_gemma.generation.programs import Programs, repeat_cache
from keras_gemma.generation.samplers.random import limit
from keras_gemma.generation.samplers.sampler import draw, first_argmax
from keras_gemma.generation.session import DecodingSession
from keras_gemma.generation.strategies.verify import DRAFT_STREAM, DraftTokens
from keras_gemma.model.cache import Cache, grow_cache, slots_of_layers

MIN_MATCH_TOKENS, MAX_MATCH_TOKENS = 2, 8
"""Minimum and maximum number of tokens at the end of a text that must occur earlier in it.

A single token nearly always occurs earlier and predicts little."""


class PromptLookupProposer:
    """Prompt-lookup decoding: proposes the continuation of an earlier match. Needs no model."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens

    def propose(self, state: DecodeState) -> DraftTokens:
        text = ops.convert_to_numpy(state.text)
        lengths, done = ops.convert_to_numpy(state.length), ops.convert_to_numpy(state.done)
        ids = np.full((self.num_tokens, len(text)), -1, "int32")
        for row in np.flatnonzero(~done):
            continuation = find_continuation(text[row, : lengths[row]], self.num_tokens)
            ids[: len(continuation), row] = continuation
        if (ids < 0).all():  # The target model reads one token, as without a draft.
            return DraftTokens()
        return DraftTokens(tuple(map(backend.to_tensor, ids)))


def find_continuation(text: np.ndarray, count: int) -> np.ndarray:
    """Returns the tokens that followed an earlier occurrence of the end of the text.

    Prefers the longest match, up to `MAX_MATCH_TOKENS`, and among these the latest. A continuation
    that reaches the end of the text repeats from its start. For example, the text 5 6 7 8 5 6
    continues with 7 8 5. Without a match, the continuation is empty.
    """
    last = len(text) - 1
    ends = np.flatnonzero(text[:-1] == text[-1])
    for back in range(1, MAX_MATCH_TOKENS):
        longer = ends[(ends >= back) & (text[ends - back] == text[last - back])]
        if not len(longer):
            if back < MIN_MATCH_TOKENS:
                return text[:0]
            break
        ends = longer
    start = ends[-1] + 1
    return text[start + np.arange(count) % (len(text) - start)]


class ModelProposer:
    """Proposes the tokens of a smaller model, which prefills the prompts into its own KV cache."""

    def __init__(self, session: DecodingSession) -> None:
        request = session.request
        self.num_tokens = request.draft.num_tokens
        self.programs: Programs = request.draft.programs
        self.weights = self.programs.backbone.tensors()
        _, cache = self.programs.prefill(request.prompts, None, self.weights)
        cache = repeat_cache(cache, request.num_return_sequences)
        lengths = backend.to_tensor(session.prompt_lengths.astype("int32"))
        config, slack = self.programs.config, self.num_tokens

        def rings(cache: Cache, lengths: Any) -> Cache:
            return to_rings(cache, lengths, config, cache[0][0].shape[1], slack)

        program = self.programs.program(("rings", slack), lambda: backend.compile(rings))
        self.cache: Cache = program(cache, lengths)
        self.program = self._propose_program(session)

    def propose(self, state: DecodeState) -> DraftTokens:
        slots = slots_of_layers(self.programs.config, state.text.shape[1], self.num_tokens)
        self.cache = grow_cache(self.cache, slots)
        state = state._replace(cache=None, logprobs=None)
        ids, logits = [], []
        for _ in range(self.num_tokens + 1):  # The last pass only caches the last draft token.
            self.cache, state, draft, draft_logits = self.program(self.weights, self.cache, state)
            ids.append(draft)
            logits += [] if draft_logits is None else [draft_logits]
        return DraftTokens(tuple(ids[:-1]), tuple(logits[:-1]))

    def _propose_program(self, session: DecodingSession) -> Any:
        config, functions = self.programs.config, self.programs.functions
        greedy = session.request.sampler.is_greedy
        processors = session.request.logits_processors

        def propose(weights: Any, cache: Cache, state: DecodeState) -> tuple[Any, ...]:
            logits, state = next_logits(weights, state._replace(cache=cache), config, functions)
            processed = apply_logits_processors(logits, state, processors)
            settings = state.sampler
            if greedy:
                ids, draft_logits = first_argmax(processed), None
            else:
                draft_logits = limit(processed, settings)
                stream = {**settings, "step": settings["step"] + DRAFT_STREAM}
                ids = ops.cast(draw(draft_logits, stream), "int32")
            draft = ops.where(state.done, -1, ids)
            cache, settings = state.cache, {**settings, "step": settings["step"] + 1}
            state = write_tokens(state._replace(cache=None, sampler=settings), logits, ids)
            return cache, state, draft, draft_logits

        key = "propose", *session.static_key()
        return self.programs.program(key, lambda: backend.compile(propose, donate=1))

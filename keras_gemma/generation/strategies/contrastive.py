"""Contrastive search: reads the top-k tokens and takes a likely one that does not repeat the text.

    text       to be or not to be
    candidate  probability  most similar hidden state    0.4 * p - 0.6 * similarity
    or         0.5          "or", 0.9                    -0.34
    that       0.3          "not", 0.2                   +0.00   taken

Su et al., 2022, arXiv:2202.06417. Rows of the cache are prompts x candidates, which differ only in
their last token. When a candidate is taken, the other rows receive its keys and values.
"""

from collections.abc import Callable
from typing import Any

from keras import ops

from keras_gemma import backend
from keras_gemma.config import GemmaConfig
from keras_gemma.generation.decode import (
    DecodeState,
    apply_logits_processors,
    positions_of,
    write_tokens,
)
from keras_gemma.generation.memory import check_memory
from keras_gemma.generation.prefill import to_rings
from keras_gemma.generation.programs import Programs, repeat_cache
from keras_gemma.generation.request import Request, SequenceOutput
from keras_gemma.generation.samplers.contrastive import best_candidate, unit_vectors
from keras_gemma.generation.samplers.sampler import LogitsProcessor, tempered
from keras_gemma.generation.session import DecodingSession
from keras_gemma.model.cache import Cache, repeat_rows, slot_of
from keras_gemma.model.head import final_norm
from keras_gemma.model.transformer import EAGER, BlockFunctions, forward_with_cache


def search(programs: Programs, request: Request) -> list[SequenceOutput]:
    """Returns the output of each prompt."""
    if request.num_return_sequences > 1:
        raise ValueError(
            "`num_return_sequences` above 1 would repeat the same text, because contrastive search "
            "is deterministic. Leave it out, or pass another `sampler`, such as 'top_p'. "
            f"Received: num_return_sequences={request.num_return_sequences}"
        )
    request.check(programs.config)
    check_memory(request, programs.backbone)
    session = ContrastiveSession(programs, request)
    session.decode()
    return session.outputs()


class ContrastiveSession(DecodingSession):
    """A contrastive search in progress.

    Its state has one row per prompt, but its cache has prompts x candidates.
    """

    def __init__(self, programs: Programs, request: Request) -> None:
        self.candidates = min(request.sampler.k, programs.config.vocabulary_size)
        super().__init__(programs, request)
        self.steps = 0  # The prefill chooses no token here.

    def _prefill(self) -> DecodeState:
        # Without the prefix cache, because it has no hidden states.
        prompts = self.request.prompts
        hidden, cache = self.programs.prefill(prompts, None, self.weights, all_tokens=True)
        config, functions, candidates = (
            self.programs.config,
            self.programs.functions,
            self.candidates,
        )

        def begin(weights: Any, hidden: Any, state: DecodeState) -> DecodeState:
            cache = to_rings(state.cache, state.length, config, state.text.shape[1])
            last = ops.take_along_axis(hidden, (state.length - 1)[:, None, None], axis=1)[:, 0]
            return state._replace(
                cache=repeat_cache(cache, candidates),
                directions=direction(hidden, weights["head"], config)[:, :, None],
                logits=functions.head(last, weights["head"], config),
            )

        key = "begin", *self.static_key()
        program = self.programs.program(key, lambda: backend.compile(begin))
        return program(self.weights, hidden, self._first_state(cache))

    def _decode_function(self) -> Callable[[Any, DecodeState], DecodeState]:
        programs, processors = self.programs, self.request.logits_processors
        config, functions, candidates = programs.config, programs.functions, self.candidates
        return lambda weights, state: take_best(
            weights, state, config, candidates, processors, functions
        )


def take_best(
    weights: dict[str, Any],
    state: DecodeState,
    config: GemmaConfig,
    candidates: int,
    processors: tuple[LogitsProcessor, ...] = (),
    functions: BlockFunctions = EAGER,
) -> DecodeState:
    """Reads the candidates of each unfinished row and appends the best one."""
    settings, batch = state.sampler, state.logits.shape[0]
    processed = tempered(apply_logits_processors(state.logits, state, processors), settings)
    probabilities, ids = ops.top_k(ops.softmax(processed, axis=-1), candidates)
    ids = ops.cast(ids, "int32")

    positions = repeat_rows(state.length, candidates)[:, None]
    token_ids = ops.reshape(ids, (batch * candidates, 1))
    x, cache = forward_with_cache(weights, token_ids, positions, state.cache, config, functions)
    new = ops.reshape(direction(x, weights["head"], config), (batch, candidates, -1))

    similarity = ops.matmul(new, ops.transpose(state.directions[:, :, 0], (0, 2, 1)))  # [B, k, S]
    in_text = positions_of(state) < state.length[:, None]
    similarity = ops.max(ops.where(in_text[:, None], similarity, -1.0), axis=-1)
    first = ops.arange(batch, dtype="int32") * candidates
    best = first + best_candidate(probabilities, similarity, settings)  # rows of the cache
    cache = share(cache, positions, repeat_rows(best, candidates))
    ids = ops.take(ops.reshape(ids, (-1,)), best)
    new = ops.take(ops.reshape(new, (batch * candidates, 1, 1, -1)), best, axis=0)
    slots = slot_of(state.length, state.directions.shape[1])[:, None]
    return write_tokens(state, state.logits, ids)._replace(
        cache=cache,
        directions=backend.write_cache(state.directions, new, slots),
        logits=functions.head(ops.take(x[:, 0], best, axis=0), weights["head"], config),
    )


def share(cache: Cache, positions: Any, source: Any) -> Cache:
    """Returns the cache `[R, S, K, H]` with the keys and values of row `source[i]` in row i, at
    `positions [R, 1]`."""

    def shared(array: Any) -> Any:
        slots = slot_of(positions, array.shape[1])
        new = ops.take_along_axis(array, slots[:, :, None, None], axis=1)
        return backend.write_cache(array, ops.take(new, source, axis=0), slots)

    return [(shared(keys), shared(values)) for keys, values in cache]


def direction(x: Any, weights: dict[str, Any], config: GemmaConfig) -> Any:
    """Returns the last block's output `[..., D]` after the final norm, divided by its L2 norm:
    float32. `weights` are those of the output head."""
    return unit_vectors(final_norm(x, weights, config))

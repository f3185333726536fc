"""Contrastive search: reads the top-k tokens and takes a likely one that does not repeat the text.

    text       to be or not to be
    candidate  probability  most similar hidden state    0.4 * p - 0.6 * similarity
    or         0.5          "or", 0.9                    -0.34
    that       0.3          "not", 0.2                   +0.00   taken

Su et al., 2022, arXiv:2202.06417. Rows of the cache are prompts x candidates, which differ only in
their last token. When a candidate is taken, the other rows receive its keys and values.
"""

import dataclasses
from typing import Any, NamedTuple

from keras import ops

from keras_gemma import backend
from keras_gemma.config import GemmaConfig
from keras_gemma.generation.decode import (
    DecodeState,
    any_unfinished,
    apply_logits_processors,
    positions_of,
    write_tokens,
)
from keras_gemma.generation.memory import check_memory
from keras_gemma.generation.prefill import to_rings
from keras_gemma.generation.programs import Programs, repeat_cache
from keras_gemma.generation.request import Request, SequenceOutput
from keras_gemma.generation.samplers.sampler import LogitsProcessor, tempered
from keras_gemma.generation.session import DecodingSession
from keras_gemma.model.cache import Cache, repeat_rows, resize, slot_of
from keras_gemma.model.normalization import rms_normalize
from keras_gemma.model.transformer import EAGER, BlockFunctions, forward_with_cache


class ContrastiveState(NamedTuple):
    """Everything that changes from one decode step to the next."""

    decode: DecodeState  # one row per prompt, but its cache has prompts x candidates
    directions: Any  # float32 [B, S, 1, D]: normalized hidden state of each token
    logits: Any  # float32 [B, V]: of the next token

    @property
    def text(self) -> Any:
        return self.decode.text

    @property
    def length(self) -> Any:
        return self.decode.length

    @property
    def done(self) -> Any:
        return self.decode.done

    @property
    def logprobs(self) -> Any:
        return self.decode.logprobs

    def grow(self, capacity: int, slots: list[int]) -> "ContrastiveState":
        """Same as in `DecodeState`."""
        return self._replace(
            decode=self.decode.grow(capacity, slots), directions=resize(self.directions, capacity)
        )


def search(programs: Programs, request: Request) -> list[SequenceOutput]:
    """Returns the output of each prompt.

    Args:
        programs: Programs of the model.
        request: Request with a `ContrastiveSampler`.

    Raises:
        ValueError: If several sequences per prompt are requested, if a prompt leaves no room in
            the context, or if there is not enough memory.
    """
    if request.num_return_sequences > 1:
        raise ValueError(
            "`num_return_sequences` above 1 would repeat the same text, because contrastive search "
            "is deterministic. Leave it out, or pass another `sampler`, such as 'top_p'. "
            f"Received: num_return_sequences={request.num_return_sequences}"
        )
    request.check(programs.config)
    candidates = min(request.sampler.k, programs.config.vocabulary_size)
    rows = dataclasses.replace(request, num_return_sequences=candidates)
    dtype = programs.backbone.compute_dtype
    check_memory(rows, programs.config, dtype, copies_at_decode=True)
    session = ContrastiveSession(programs, request, candidates)
    session.decode()
    return session.outputs()


class ContrastiveSession(DecodingSession):
    """A contrastive search in progress.

    Args:
        programs: Programs of the model.
        request: A request that has been checked.
        candidates: Number of candidate tokens per decode step.
    """

    def __init__(self, programs: Programs, request: Request, candidates: int) -> None:
        self.candidates = candidates
        super().__init__(programs, request)
        self.steps = 0  # The prefill chooses no token here.

    def _prefill(self) -> ContrastiveState:
        # Without the prefix cache, because it has no hidden states.
        prompts = self.request.prompts
        hidden, cache = self.programs.prefill(prompts, None, self.weights, all_tokens=True)
        program = self._prefill_program(cache[0][0].shape[1])
        return program(self.weights, hidden, self._first_state(cache))

    def _prefill_program(self, capacity: int) -> Any:
        """Returns the program that fills the ring buffers and computes the first logits."""
        config, parts, candidates = self.programs.config, self.programs.parts, self.candidates

        def begin(weights: Any, hidden: Any, decode: DecodeState) -> ContrastiveState:
            cache = to_rings(decode.cache, decode.length, config, decode.text.shape[1])
            last = ops.take_along_axis(hidden, (decode.length - 1)[:, None, None], axis=1)[:, 0]
            return ContrastiveState(
                decode=decode._replace(cache=repeat_cache(cache, candidates)),
                directions=direction(hidden, weights["head"], config)[:, :, None],
                logits=parts.head(last, weights["head"], config),
            )

        return self.programs.program(("begin", *self.static_key()), lambda: backend.compile(begin))

    def _decode_program(self) -> Any:
        """Returns the program that runs decode steps."""
        programs, processors = self.programs, self.request.logits_processors
        config, parts, candidates = programs.config, programs.parts, self.candidates

        def decode_step(weights: Any, state: ContrastiveState) -> ContrastiveState:
            return take_best(weights, state, config, candidates, processors, parts)

        key = "step", *self.static_key()
        return programs.program(key, lambda: backend.while_loop(any_unfinished, decode_step))


def take_best(
    weights: dict[str, Any],
    state: ContrastiveState,
    config: GemmaConfig,
    candidates: int,
    processors: tuple[LogitsProcessor, ...] = (),
    parts: BlockFunctions = EAGER,
) -> ContrastiveState:
    """Reads the candidates of each unfinished row and appends the best one."""
    decode, settings = state.decode, state.decode.sampler
    batch = state.logits.shape[0]
    processed = tempered(apply_logits_processors(state.logits, decode, processors), settings)
    probabilities, ids = ops.top_k(ops.softmax(processed, axis=-1), candidates)
    ids = ops.cast(ids, "int32")

    positions = repeat_rows(decode.length, candidates)[:, None]
    token_ids = ops.reshape(ids, (batch * candidates, 1))
    x, cache = forward_with_cache(weights, token_ids, positions, decode.cache, config, parts)
    new = ops.reshape(direction(x, weights["head"], config), (batch, candidates, -1))

    similarity = ops.matmul(new, ops.transpose(state.directions[:, :, 0], (0, 2, 1)))  # [B, k, S]
    in_text = positions_of(decode) < decode.length[:, None]
    similarity = ops.max(ops.where(in_text[:, None], similarity, -1.0), axis=-1)
    alpha = settings["alpha"][:, None]
    best = ops.argmax((1 - alpha) * probabilities - alpha * similarity, axis=-1)

    first = ops.arange(batch, dtype="int32") * candidates
    best = first + ops.cast(best, "int32")  # rows of the cache
    cache = share(cache, positions, repeat_rows(best, candidates))
    ids = ops.take(ops.reshape(ids, (-1,)), best)
    new = ops.take(ops.reshape(new, (batch * candidates, 1, 1, -1)), best, axis=0)
    slots = slot_of(decode.length, state.directions.shape[1])[:, None]
    return ContrastiveState(
        decode=write_tokens(decode._replace(cache=cache), state.logits, ids),
        directions=backend.write_cache(state.directions, new, slots),
        logits=parts.head(ops.take(x[:, 0], best, axis=0), weights["head"], config),
    )


def share(cache: Cache, positions: Any, source: Any) -> Cache:
    """Returns the cache with the keys and values of row `source[i]` in row i, at `positions`.

    Args:
        cache: KV cache, `[R, S, K, H]`.
        positions: int32 `[R, 1]`.
        source: int32 `[R]`.
    """

    def shared(array: Any) -> Any:
        slots = slot_of(positions, array.shape[1])
        new = ops.take_along_axis(array, slots[:, :, None, None], axis=1)
        return backend.write_cache(array, ops.take(new, source, axis=0), slots)

    return [(shared(keys), shared(values)) for keys, values in cache]


def direction(x: Any, weights: dict[str, Any], config: GemmaConfig) -> Any:
    """Returns the last block's output after the final norm, divided by its L2 norm: float32.

    Args:
        x: `[..., D]`.
        weights: Weights of the output head.
        config: Configuration of the model.
    """
    x = rms_normalize(x, weights["final_norm"], config.layer_norm_epsilon)
    x = ops.cast(x, "float32")
    squared = ops.sum(ops.square(x), axis=-1, keepdims=True)
    return x * ops.rsqrt(ops.maximum(squared, 1e-12))

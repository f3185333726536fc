"""Contrastive search: the likeliest tokens are read, and one that says something new is taken.

    text       to be or not to be
    candidate  probability  hidden state is most like that of   0.4 * p - 0.6 * similarity
    or         0.5          "or", 0.9                           -0.34
    that       0.3          "not", 0.2                          +0.00   taken

Su et al., 2022, arXiv:2202.06417. Rows of the cache are prompts x candidates, which differ in their
last token alone: once one is taken, the others get its keys and values.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_gemma import backend
from keras_gemma.config import GemmaConfig
from keras_gemma.generation.decode import (
    DecodeState,
    advance,
    place,
    proceed,
    process,
)
from keras_gemma.generation.memory import check_memory
from keras_gemma.generation.prefill import to_rings
from keras_gemma.generation.programs import Programs
from keras_gemma.generation.request import Request, Row
from keras_gemma.generation.samplers.sampler import LogitsProcessor, tempered
from keras_gemma.generation.session import Run
from keras_gemma.model.cache import Cache, repeat_rows, resize, slot_of
from keras_gemma.model.normalization import rms_normalize
from keras_gemma.model.transformer import EAGER, BlockFunctions, forward_with_cache


class ContrastiveState(NamedTuple):
    """All that changes from one token to the next."""

    decode: DecodeState  # its rows are prompts, but those of its cache prompts x candidates
    directions: Any  # float32 [B, S, 1, D]: the hidden state of each token, at length 1
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
    def log_probabilities(self) -> Any:
        return self.decode.log_probabilities

    def grow(self, capacity: int, slots: list[int]) -> "ContrastiveState":
        """With room for texts of `capacity` tokens, and caches of `slots` a layer."""
        return self._replace(
            decode=self.decode.grow(capacity, slots), directions=resize(self.directions, capacity)
        )


def search(generator: Programs, request: Request) -> list[Row]:
    """The row of each prompt.

    Args:
        generator: whose model and programs are used.
        request: with a `ContrastiveSampler`.

    Raises:
        ValueError: several copies, prompts that leave no room, too little memory.
    """
    if request.copies > 1:
        raise ValueError(
            "`num_return_sequences` above 1 would repeat the same text: contrastive search draws "
            "nothing. Leave it out, or pass another `sampler`, such as 'top_p'. "
            f"Received: num_return_sequences={request.copies}"
        )
    request.check(generator.config)
    candidates = min(request.sampler.k, generator.config.vocabulary_size)
    widest = dataclasses.replace(request, copies=candidates)
    check_memory(widest, generator.config, generator.backbone.compute_dtype, late=True)
    run = ContrastiveRun(generator, request, candidates)
    run.go_on()
    return run.rows()


class ContrastiveRun(Run):
    """A contrastive search in progress.

    Args:
        generator: whose programs it uses.
        request: what is asked; checked already.
        candidates: how many tokens are read at each place.
    """

    def __init__(self, generator: Programs, request: Request, candidates: int) -> None:
        self.generator = generator
        self.request = request
        self.candidates = candidates
        self.weights = generator.backbone.tensors()
        self.slack = 0
        self.lengths = np.array([len(prompt) for prompt in request.prompts])
        self.ends = self.lengths + np.array(request.room)
        hidden, cache = generator.read(request.prompts, None, self.weights, every=True)
        begin = self._begin(cache[0][0].shape[1])
        self.state = begin(self.weights, hidden, self._first_state(cache))
        self.steps = 0

    def _begin(self, capacity: int) -> Any:
        """The program that makes rings of the prompt's cache and the first logits."""
        config, parts, candidates = self.generator.config, self.generator.parts, self.candidates

        def begin(weights: Any, hidden: Any, decode: DecodeState) -> ContrastiveState:
            cache = to_rings(decode.cache, decode.length, config, decode.text.shape[1])
            cache = [tuple(repeat_rows(array, candidates) for array in kept) for kept in cache]
            last = ops.take_along_axis(hidden, (decode.length - 1)[:, None, None], axis=1)[:, 0]
            return ContrastiveState(
                decode=decode._replace(cache=cache),
                directions=direction(hidden, weights["head"], config)[:, :, None],
                logits=parts.head(last, weights["head"], config),
            )

        return self.generator.program(("begin", *self.rules()), lambda: backend.compile(begin))

    def _loop(self) -> Any:
        """The program that chooses the tokens."""
        generator, processors = self.generator, self.request.processors
        config, parts, candidates = generator.config, generator.parts, self.candidates

        def turn(weights: Any, state: ContrastiveState) -> ContrastiveState:
            return take_best(weights, state, config, candidates, processors, parts)

        return generator.program(("step", *self.rules()), lambda: backend.while_loop(proceed, turn))


def take_best(
    weights: dict[str, Any],
    state: ContrastiveState,
    config: GemmaConfig,
    candidates: int,
    processors: tuple[LogitsProcessor, ...] = (),
    parts: BlockFunctions = EAGER,
) -> ContrastiveState:
    """One token more in each row that has not ended: read the candidates, and take the best."""
    decode, settings = state.decode, state.decode.sampler
    batch = state.logits.shape[0]
    wanted = tempered(process(state.logits, decode, processors), settings)
    likely, ids = ops.top_k(ops.softmax(wanted, axis=-1), candidates)
    ids = ops.cast(ids, "int32")

    positions = repeat_rows(decode.length, candidates)[:, None]
    read = ops.reshape(ids, (batch * candidates, 1))
    x, cache = forward_with_cache(weights, read, positions, decode.cache, config, parts)
    new = ops.reshape(direction(x, weights["head"], config), (batch, candidates, -1))

    similar = ops.matmul(new, ops.transpose(state.directions[:, :, 0], (0, 2, 1)))  # [B, k, S]
    in_text = place(decode) < decode.length[:, None]
    similar = ops.max(ops.where(in_text[:, None], similar, -1.0), axis=-1)
    alpha = settings["alpha"][:, None]
    best = ops.argmax((1 - alpha) * likely - alpha * similar, axis=-1)

    first = ops.arange(batch, dtype="int32") * candidates
    taken = first + ops.cast(best, "int32")  # among the rows that were read
    cache = share(cache, positions, repeat_rows(taken, candidates))
    ids = ops.take(ops.reshape(ids, (-1,)), taken)
    new = ops.take(ops.reshape(new, (batch * candidates, 1, 1, -1)), taken, axis=0)
    slots = slot_of(decode.length, state.directions.shape[1])[:, None]
    return ContrastiveState(
        decode=put_down(decode._replace(cache=cache), state.logits, ids),
        directions=backend.write_cache(state.directions, new, slots),
        logits=parts.head(ops.take(x[:, 0], taken, axis=0), weights["head"], config),
    )


def share(cache: Cache, positions: Any, source: Any) -> Cache:
    """The cache with the keys and values of row `source[i]` at `positions [R, 1]` in row i."""

    def shared(array: Any) -> Any:
        slots = slot_of(positions, array.shape[1])
        new = ops.take_along_axis(array, slots[:, :, None, None], axis=1)
        return backend.write_cache(array, ops.take(new, source, axis=0), slots)

    return [(shared(keys), shared(values)) for keys, values in cache]


def put_down(decode: DecodeState, logits: Any, ids: Any) -> DecodeState:
    """The state with `ids [B]` as the next tokens, which were chosen by `logits [B, V]`."""
    penalty = decode.penalty  # it has had its due
    after = advance(decode._replace(penalty=None), logits, lambda _, state: (ids, state))
    return after._replace(penalty=penalty)


def direction(x: Any, weights: dict[str, Any], config: GemmaConfig) -> Any:
    """The last block's output `[..., D]`, normalised as before the head, at length 1: float32."""
    x = rms_normalize(x, weights["final_norm"], config.layer_norm_epsilon)
    x = ops.cast(x, "float32")
    squared = ops.sum(ops.square(x), axis=-1, keepdims=True)
    return x * ops.rsqrt(ops.maximum(squared, 1e-12))

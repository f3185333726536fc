"""Prompts in, new tokens out: shapes chosen, programs compiled once and kept.

Shapes are rounded up to powers of two, so that a prompt one token longer compiles nothing. The
cache grows with the text, by doubling, so that a short text costs little in whatever room it has.
"""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops

from keras_gemma import backend
from keras_gemma.config import GemmaConfig
from keras_gemma.generation.decode import (
    DecodeState,
    advance,
    no_log_probabilities,
    proceed,
    step,
)
from keras_gemma.generation.feed import AS_THEY_ARE, Parts
from keras_gemma.generation.memory import check_memory
from keras_gemma.generation.prefill import read_chunk, to_rings
from keras_gemma.generation.request import Prefix, Request, Row, stop_array
from keras_gemma.generation.speculative import SpeculativeRun
from keras_gemma.model.backbone import GemmaBackbone
from keras_gemma.model.cache import Cache, make_cache, repeat_rows, resize, slots_of_layers

SMALLEST_BUCKET = 16
"""Of a prompt."""

SMALLEST_CACHE = 256
"""Slots that cost next to nothing, and spare short texts the growing."""

LARGEST_CHUNK = 512
"""Tokens of a prompt that are read at once, of all rows together."""


def bucket(length: int, smallest: int = SMALLEST_BUCKET) -> int:
    """`length` rounded up to a power of two, `smallest` at least."""
    return max(smallest, 1 << (length - 1).bit_length())


def chunks(start: int, end: int, batch: int) -> list[tuple[int, int]]:
    """Where to cut the tokens from `start` to `end`: beginnings, and sizes that are buckets."""
    largest = max(SMALLEST_BUCKET, bucket(LARGEST_CHUNK // batch + 1) // 2)
    cuts = []
    while start < end:
        cuts.append((start, min(largest, bucket(end - start))))
        start += cuts[-1][1]
    return cuts


class Generator:
    """The compiled programs of one backbone.

    Args:
        backbone: its weights are read anew at each call, so training in between is seen.
        eager: leave the block uncompiled where it would be compiled apart (PyTorch): slow, but
            it starts at once.
    """

    def __init__(self, backbone: GemmaBackbone, eager: bool = False) -> None:
        self.backbone = backbone
        self.eager = eager
        self.config: GemmaConfig = backbone.config
        self.parts = AS_THEY_ARE if eager else Parts(*map(backend.fuse, AS_THEY_ARE))
        self.programs: dict[Any, Any] = {}
        self.lock = threading.Lock()

    def generate(self, request: Request) -> list[Row]:
        """Continue each prompt to its end.

        Raises:
            ValueError: an empty or too long prompt, no room.
        """
        search = getattr(request.sampler, "search", None)
        if search is not None:
            return search(self, request)
        run = self.start(request)
        run.go_on()
        return run.rows()

    def start(self, request: Request) -> "Run | SpeculativeRun":
        """Read the prompts and choose the first tokens; the run goes on from there."""
        self.check(request)
        run = Run(self, request)
        return run if request.draft is None else SpeculativeRun(run)

    def check(self, request: Request) -> None:
        """Raise a ValueError where the model or the memory cannot do what is asked."""
        if hasattr(request.sampler, "search"):
            kind = type(request.sampler).__name__
            raise ValueError(
                f"{kind} knows its text only at the end: `stream` and `stop` need a sampler that "
                "goes token by token. Pass another `sampler`, such as 'greedy', or call "
                "`generate` without `stop`; `stop_token_ids` work with both."
            )
        request.check(self.config)
        check_memory(request, self.config, self.backbone.compute_dtype)

    def prefill(self, ids: np.ndarray) -> Prefix:
        """Read the beginning of a text, to go on from it later."""
        _, cache = self.read([ids], None, self.backbone.tensors())
        return Prefix(ids, cache)

    def program(self, key: Any, make: Callable[[], Any]) -> Any:
        """The program of `key`, made when it is first asked for.

        The compilers tell apart the shapes of arguments; what a program closes over is our part.
        """
        with self.lock:
            if key not in self.programs:
                self.programs[key] = make()
            return self.programs[key]

    def read(
        self,
        prompts: list[np.ndarray],
        prefix: Prefix | None,
        weights: Any,
        every: bool = False,
    ) -> tuple[Any, Cache]:
        """Read prompts, but for what they share with `prefix`.

        Returns:
            What the last block says of each prompt's last token, `[B, D]`, and the cache by
            position, with a slot free in each row. With `every`, which allows no prefix, what it
            says of every token, `[B, S, D]`, with as many places as the cache has slots.
        """
        config, batch = self.config, len(prompts)
        lengths = np.array([len(prompt) for prompt in prompts], "int32")
        start = 0 if prefix is None else prefix.shared_with(prompts)
        cuts = chunks(start, int(lengths.max()), batch)
        end = sum(cuts[-1])
        slots = bucket(max(end, int(lengths.max()) + 1), SMALLEST_CACHE)
        token_ids = np.zeros((batch, end), "int32")
        for row, prompt in zip(token_ids, prompts, strict=True):
            row[: len(prompt)] = prompt
        dtype = self.backbone.compute_dtype
        if start:
            cache = [
                tuple(repeat_rows(resize(array, slots), batch) for array in kept)
                for kept in prefix.cache
            ]
        else:
            cache = make_cache(config, batch, slots, dtype)
        places = (slots,) if every else ()
        hidden = ops.zeros((batch, *places, config.hidden_dim), dtype=dtype)

        def program(weights: Any, cache: Cache, hidden: Any, *args: Any) -> tuple[Any, Cache]:
            token_ids, start, lengths = args
            return read_chunk(weights, token_ids, start, lengths, hidden, cache, config)

        run = self.program("chunk", lambda: backend.compile(program, donate=1))
        for start, size in cuts:
            hidden, cache = run(
                weights,
                cache,
                hidden,
                ops.convert_to_tensor(token_ids[:, start : start + size]),
                ops.convert_to_tensor(np.int32(start)),
                ops.convert_to_tensor(lengths),
            )
        return hidden, cache


class Run:
    """A generation in progress.

    Args:
        generator: whose programs it uses.
        request: what is asked; checked already.
    """

    def __init__(self, generator: Generator, request: Request) -> None:
        self.generator = generator
        self.request = request
        self.weights = generator.backbone.tensors()
        self.slack = request.draft.tokens if request.draft else 0
        copies = request.copies
        self.lengths = np.repeat([len(prompt) for prompt in request.prompts], copies)
        self.ends = self.lengths + np.repeat(request.room, copies)
        hidden, cache = generator.read(request.prompts, request.prefix, self.weights)
        if copies > 1:
            hidden = repeat_rows(hidden, copies)
            cache = [tuple(repeat_rows(array, copies) for array in kept) for kept in cache]
        self.state = self._begin(cache[0][0].shape[1])(
            self.weights, hidden, self._first_state(cache)
        )
        self.steps = 1

    def _first_state(self, cache: Cache) -> DecodeState:
        """The state before the first token is chosen."""
        request, config = self.request, self.generator.config
        batch, capacity = len(self.lengths), cache[0][0].shape[1]
        text = np.full((batch, capacity), -1, "int32")
        seen = penalty = records = None
        if request.repetition_penalty is not None:
            seen = np.zeros((batch, config.vocabulary_size), "bool")
            penalty = np.broadcast_to(request.repetition_penalty, len(request.prompts))
            penalty = np.repeat(penalty, request.copies).astype("float32")
        for row in range(batch):
            prompt = request.prompts[row // request.copies]
            text[row, : len(prompt)] = prompt
            if seen is not None:
                seen[row, prompt] = True
        if request.top_log_probabilities is not None:
            records = no_log_probabilities(batch, capacity, request.top_log_probabilities)
        tensor = ops.convert_to_tensor
        return DecodeState(
            text=tensor(text),
            length=tensor(self.lengths.astype("int32")),
            end=tensor(self.ends.astype("int32")),
            stop_ids=tensor(stop_array(request.stop_ids)),
            done=tensor(np.zeros(batch, "bool")),
            cache=cache,
            sampler=request.sampler.init(batch, request.seed, request.copy_numbers()),
            seen=None if seen is None else tensor(seen),
            penalty=None if penalty is None else tensor(penalty),
            log_probabilities=records,
        )

    def _begin(self, capacity: int) -> Any:
        """The program that makes rings of the prompt's cache and chooses the first token."""
        generator, sampler = self.generator, self.request.sampler
        config, parts, processors = generator.config, generator.parts, self.request.processors
        slack = self.slack

        def begin(weights: Any, hidden: Any, state: DecodeState) -> DecodeState:
            capacity = state.text.shape[1]
            cache = to_rings(state.cache, state.length, config, capacity, slack)
            logits = parts.head(hidden, weights["head"], config)
            state = state._replace(cache=cache)
            return advance(state, logits, sampler, processors)

        # A buffer can be given up for one of its own size alone: not where rings are made.
        slots = slots_of_layers(config, capacity, slack)
        donate = 2 if min(slots) == capacity else None
        key = "begin", donate, slack, *self.rules()
        return generator.program(key, lambda: backend.compile(begin, donate))

    def _loop(self) -> Any:
        """The program that chooses the others."""
        generator, sampler = self.generator, self.request.sampler
        config, parts, processors = generator.config, generator.parts, self.request.processors

        def turn(weights: Any, state: DecodeState) -> DecodeState:
            return step(weights, state, config, sampler, processors, parts)

        return generator.program(("step", *self.rules()), lambda: backend.loop(proceed, turn))

    def rules(self) -> tuple[Any, ...]:
        """What of the request is compiled in."""
        return self.request.sampler.structure(), self.request.processors

    def go_on(self, limit: int | None = None) -> bool:
        """Choose up to `limit` tokens more in each row; by default all that may follow.

        Returns:
            Whether a row is still growing.
        """
        most = int((self.ends - self.lengths).max())
        limit = most - self.steps if limit is None else min(limit, most - self.steps)
        while limit > 0:
            # The longest row, as far as is known without asking the device.
            length = int(np.minimum(self.lengths + self.steps, self.ends - 1).max())
            self.make_room(length + 1)
            turns = min(limit, self.state.text.shape[1] - length)
            self.state = self._loop()(self.weights, self.state, turns)
            self.steps += turns
            limit -= turns
            if limit > 0 and not bool(proceed(self.state)):
                break
        return self.steps < most and bool(proceed(self.state))

    def make_room(self, length: int) -> None:
        """Let texts have `length` tokens at least."""
        if length > self.state.text.shape[1]:
            capacity = bucket(length)
            slots = slots_of_layers(self.generator.config, capacity, self.slack)
            self.state = self.state.grow(capacity, slots)

    def stop(self, rows: np.ndarray) -> None:
        """End those of `rows`, bool `[B]`, that are true."""
        done = ops.logical_or(self.state.done, ops.convert_to_tensor(rows))
        self.state = self.state._replace(done=done)

    def new_ids(self) -> list[np.ndarray]:
        """The tokens of each row so far."""
        text = ops.convert_to_numpy(self.state.text)
        ends = ops.convert_to_numpy(self.state.length)
        return [row[a:b] for row, a, b in zip(text, self.lengths, ends, strict=True)]

    def rows(self) -> list[Row]:
        """What each row got."""
        records: Any = self.state.log_probabilities or ()
        records = [ops.convert_to_numpy(array) for array in records]
        rows = []
        for i, ids in enumerate(self.new_ids()):
            span = slice(self.lengths[i], self.lengths[i] + len(ids))
            stopped = bool(len(ids)) and int(ids[-1]) in self.request.stop_ids
            rows.append(Row(ids, stopped, *(array[i, span] for array in records)))
        return rows

"""A generation in progress: the first token, then as many as are asked for.

The cache grows with the text, by doubling, so that a short text costs little in whatever room it
has. Which tokens end a text is known here; what they mean is not.
"""

import weakref
from collections.abc import Hashable
from typing import Any

import numpy as np
from keras import ops

from keras_gemma import backend
from keras_gemma.generation.buckets import SMALLEST_CACHE, bucket
from keras_gemma.generation.decode import (
    DecodeState,
    advance,
    no_log_probabilities,
    proceed,
    step,
)
from keras_gemma.generation.prefill import to_rings
from keras_gemma.generation.programs import Programs
from keras_gemma.generation.request import Prefix, Request, Row, mark_of, stop_array
from keras_gemma.model.cache import Cache, repeat_rows, slots_of_layers, unroll_ring


class Run:
    """A generation in progress.

    Args:
        generator: whose programs it uses.
        request: what is asked; checked already.
    """

    def __init__(self, generator: Programs, request: Request) -> None:
        self.generator = generator
        self.request = request
        self.weights = generator.backbone.tensors()
        self.slack = request.draft.tokens if request.draft else 0
        copies = request.copies
        self.lengths = np.repeat([len(prompt) for prompt in request.prompts], copies)
        self.ends = self.lengths + np.repeat(request.room, copies)
        self.prefilled = request.tokens_to_read()
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

        return generator.program(("step", *self.rules()), lambda: backend.while_loop(proceed, turn))

    def rules(self) -> tuple[Any, ...]:
        """What of the request is compiled in."""
        return tuple(map(key_of, (self.request.sampler.structure(), *self.request.processors)))

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

    def prefix(self) -> Prefix:
        """All that was read and chosen, but for the last token, for another text to go on from.

        Of a run of one row, at its end: the prefix takes its cache over.
        """
        backbone = self.generator.backbone
        length = int(ops.convert_to_numpy(self.state.length)[0]) - 1
        ids = ops.convert_to_numpy(self.state.text)[0, :length]
        slots = bucket(length, SMALLEST_CACHE)
        rings = [kept[0].shape[1] for kept in self.state.cache]
        turned = min(rings) <= length + self.slack  # the last token may be written already
        cache = [tuple(unroll_ring(array, slots) for array in kept) for kept in self.state.cache]
        fewest = length if turned else 0
        return Prefix(ids, cache, weakref.ref(backbone), mark_of(backbone), fewest)

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


class Identity:
    """Stands for an object that cannot be hashed: equal to itself alone."""

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and self.thing is other.thing

    def __hash__(self) -> int:
        return id(self.thing)


def key_of(thing: Any) -> Hashable:
    """`thing`, or its `Identity`: functions and samplers of a caller's own may be anything."""
    try:
        hash(thing)
    except TypeError:
        return Identity(thing)
    return thing

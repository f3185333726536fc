"""One batch of sequences: prefill, then decode in steps that the caller chooses.

The cache grows with the text, by doubling, so a short text needs little memory whatever its
maximum length. Knows no text.
"""

import weakref
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
from keras import ops

from keras_gemma import backend
from keras_gemma.buckets import bucket
from keras_gemma.generation.decode import (
    DecodeState,
    Logprobs,
    any_unfinished,
    append_tokens,
    next_logits,
)
from keras_gemma.generation.engine_request import TokenConstraint
from keras_gemma.generation.prefill import capacity_for, to_rings
from keras_gemma.generation.programs import Programs, repeat_cache
from keras_gemma.generation.request import (
    PrefixCache,
    Request,
    SequenceOutput,
    weights_fingerprint,
)
from keras_gemma.generation.samplers.sampler import Numbers
from keras_gemma.generation.stopping import ends_with_stop_token, stop_array
from keras_gemma.model.cache import Cache, repeat_rows, slots_of_layers, unroll_ring


class DecodingSession:
    """A batch of sequences in progress. The constructor prefills and chooses the first tokens."""

    def __init__(self, programs: Programs, request: Request) -> None:
        self.programs = programs
        self.request = request
        self.weights = programs.backbone.tensors()
        self.slack = request.draft.num_tokens if request.draft else 0
        num_return_sequences = request.num_return_sequences
        lengths = [len(prompt) for prompt in request.prompts]
        self.prompt_lengths = np.repeat(lengths, num_return_sequences)
        self.ends = self.prompt_lengths + np.repeat(request.max_new_tokens, num_return_sequences)
        self.prefilled_tokens = request.num_prefill_tokens()
        self.constraints: list[TokenConstraint] = []
        if request.constraint is not None:
            self.constraints = [request.constraint() for _ in self.prompt_lengths]
        self.state = self._prefill()
        self.steps = 1

    def _prefill(self) -> DecodeState:
        request = self.request
        num_return_sequences = request.num_return_sequences
        hidden, cache = self.programs.prefill(request.prompts, request.prefix, self.weights)
        if num_return_sequences > 1:
            hidden = repeat_rows(hidden, num_return_sequences)
            cache = repeat_cache(cache, num_return_sequences)
        program = self._prefill_program(cache[0][0].shape[1])
        return program(self.weights, hidden, self._first_state(cache))

    def _first_state(self, cache: Cache) -> DecodeState:
        """Returns the state before the first token is chosen."""
        request, config = self.request, self.programs.config
        num_return_sequences = request.num_return_sequences
        batch, capacity = len(self.prompt_lengths), cache[0][0].shape[1]
        text = np.full((batch, capacity), -1, "int32")
        tensor = backend.to_tensor
        seen = penalty = counts = frequency = presence = logprobs = allowed = None
        if request.repetition_penalty is not None:
            seen = np.zeros((batch, config.vocabulary_size), "bool")
            penalty = tensor(self._of_rows(request.repetition_penalty))
        if request.has_counts:
            counts = tensor(np.zeros((batch, config.vocabulary_size), "int32"))
            frequency = tensor(self._of_rows(request.frequency_penalty))
            presence = tensor(self._of_rows(request.presence_penalty))
        if self.constraints:
            allowed = tensor(np.stack([constraint.allowed() for constraint in self.constraints]))
        for row in range(batch):
            prompt = request.prompts[row // num_return_sequences]
            text[row, : len(prompt)] = prompt
            if seen is not None:
                seen[row, prompt] = True
        if request.top_logprobs is not None:
            chosen, tops = (batch, capacity), (batch, capacity, request.top_logprobs)
            logprobs = Logprobs(
                ops.zeros(chosen, "float32"), ops.zeros(tops, "int32"), ops.zeros(tops, "float32")
            )
        return DecodeState(
            text=tensor(text),
            length=tensor(self.prompt_lengths.astype("int32")),
            end=tensor(self.ends.astype("int32")),
            stop_token_ids=tensor(stop_array(request.stop_token_ids)),
            done=tensor(np.zeros(batch, "bool")),
            cache=cache,
            sampler=request.sampler.init(batch, request.seed, request.row_keys()),
            seen=None if seen is None else tensor(seen),
            penalty=penalty,
            logprobs=logprobs,
            counts=counts,
            frequency=frequency,
            presence=presence,
            allowed=allowed,
        )

    def _of_rows(self, value: Numbers | None) -> np.ndarray:
        """Returns one value, or one per prompt, as one per row: float32 `[B]`. `None` means 0."""
        request, value = self.request, 0.0 if value is None else value
        values = np.broadcast_to(value, len(request.prompts)).astype("float32")
        return np.repeat(values, request.num_return_sequences)

    def _prefill_program(self, capacity: int) -> Any:
        """Returns the program that fills the ring buffers and chooses the first token."""
        config, functions, slack = self.programs.config, self.programs.functions, self.slack
        append = self._append_function()

        def begin(weights: Any, hidden: Any, state: DecodeState) -> DecodeState:
            capacity = state.text.shape[1]
            cache = to_rings(state.cache, state.length, config, capacity, slack)
            logits = functions.head(hidden, weights["head"], config)
            return append(state._replace(cache=cache), logits)

        # A donated buffer must have the size of its output, so a cache with rings is not donated.
        slots = slots_of_layers(config, capacity, slack)
        donate = 2 if min(slots) == capacity else None
        key = "begin", donate, slack, *self.static_key()
        return self.programs.program(key, lambda: backend.compile(begin, donate))

    def _append_function(self) -> Callable[[DecodeState, Any], DecodeState]:
        """Returns the function that chooses tokens by their logits `[B, V]`, and appends them."""
        sampler, processors = self.request.sampler, self.request.logits_processors
        return lambda state, logits: append_tokens(state, logits, sampler, processors)

    def _decode_function(self) -> Callable[[Any, DecodeState], DecodeState]:
        """Returns the decode step, a function of the weights and the state."""
        config, functions = self.programs.config, self.programs.functions
        append = self._append_function()

        def decode_step(weights: Any, state: DecodeState) -> DecodeState:
            logits, state = next_logits(weights, state, config, functions)
            return append(state, logits)

        return decode_step

    def static_key(self) -> tuple[Any, ...]:
        """Returns the key of everything in the request that is compiled into the programs."""
        request = self.request
        return tuple(map(hashable, (request.sampler.structure(), *request.logits_processors)))

    def decode(self, n: int | None = None) -> bool:
        """Chooses up to `n` more tokens in each row; `None` decodes until all rows have ended.

        Returns True if any row is unfinished.
        """
        max_steps = int((self.ends - self.prompt_lengths).max())
        n = max_steps - self.steps if n is None else min(n, max_steps - self.steps)
        while n > 0:
            # An upper bound of the longest row, known without asking the device.
            length = int(np.minimum(self.prompt_lengths + self.steps, self.ends - 1).max())
            self.ensure_capacity(length + 1)
            steps = min(n, self.state.text.shape[1] - length)
            if self.constraints:
                self._constrain()
                steps = 1
            program = self.programs.program(
                ("step", *self.static_key()),
                lambda: backend.while_loop(any_unfinished, self._decode_function()),
            )
            self.state = program(self.weights, self.state, steps)
            self.steps += steps
            n -= steps
            if n > 0 and not bool(any_unfinished(self.state)):
                break
        return self.steps < max_steps and bool(any_unfinished(self.state))

    def _constrain(self) -> None:
        """Adds the last token of each unfinished row to its constraint, and masks the next one."""
        allowed = ops.convert_to_numpy(self.state.allowed).copy()
        done = ops.convert_to_numpy(self.state.done)
        for row, ids in enumerate(self.new_ids()):
            if not done[row]:
                self.constraints[row].accept(int(ids[-1]))
                allowed[row] = self.constraints[row].allowed()
        self.state = self.state._replace(allowed=backend.to_tensor(allowed))

    def ensure_capacity(self, length: int) -> None:
        """Grows text and cache to at least `length` tokens."""
        if length > self.state.text.shape[1]:
            capacity = bucket(length)
            slots = slots_of_layers(self.programs.config, capacity, self.slack)
            self.state = self.state.grow(capacity, slots)

    def stop(self, rows: np.ndarray) -> None:
        """Ends the rows that are True in `rows`, bool `[B]`."""
        done = ops.logical_or(self.state.done, backend.to_tensor(rows))
        self.state = self.state._replace(done=done)

    def new_ids(self) -> list[np.ndarray]:
        """Returns the new tokens of each row so far."""
        text = ops.convert_to_numpy(self.state.text)
        ends = ops.convert_to_numpy(self.state.length)
        return [row[a:b] for row, a, b in zip(text, self.prompt_lengths, ends, strict=True)]

    def prefix(self) -> PrefixCache:
        """Returns the prefix cache of a finished single-sequence session.

        It holds all tokens but the last. The session's cache is moved, not copied.
        """
        backbone = self.programs.backbone
        length = int(ops.convert_to_numpy(self.state.length)[0]) - 1
        ids = ops.convert_to_numpy(self.state.text)[0, :length]
        slots = capacity_for(length)
        smallest = min(keys.shape[1] for keys, _ in self.state.cache)
        # Equality counts, because the last token may be in the cache already.
        is_wrapped = smallest <= length + self.slack
        cache = [tuple(unroll_ring(array, slots) for array in pair) for pair in self.state.cache]
        return PrefixCache(
            ids,
            cache,
            weakref.ref(backbone),
            weights_fingerprint(backbone),
            min_shared_tokens=length if is_wrapped else 0,
        )

    def outputs(self) -> list[SequenceOutput]:
        """Returns the output of each row so far."""
        logprobs: Any = self.state.logprobs or ()
        logprobs = [ops.convert_to_numpy(array) for array in logprobs]
        outputs = []
        for i, ids in enumerate(self.new_ids()):
            span = slice(self.prompt_lengths[i], self.prompt_lengths[i] + len(ids))
            stopped = ends_with_stop_token(ids, self.request.stop_token_ids)
            outputs.append(SequenceOutput(ids, stopped, *(array[i, span] for array in logprobs)))
        return outputs


class ByIdentity:
    """Wrapper that makes an unhashable object hashable: equal only if the object is the same."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByIdentity) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def hashable(value: Any) -> Hashable:
    """Returns `value`, such as a custom sampler, in `ByIdentity` if it cannot be hashed."""
    try:
        hash(value)
    except TypeError:
        return ByIdentity(value)
    return value

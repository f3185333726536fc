"""Slots of the engine: the rows of one decode state, filled and freed one at a time.

    prefill    reads one prompt, in the chunks that `generate` has
    insert     chooses its first token, and writes the row into a slot
    decode     chooses the next token of all slots

A free slot is a finished row, which decoding leaves as it is. The number of slots is one of a few
batch sizes, because each size compiles a program, and a decode step takes longer with more rows.
Knows nothing about queues.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_gemma import backend
from keras_gemma.buckets import bucket
from keras_gemma.generation.engine_request import EngineRequest
from keras_gemma.generation.engine_step import (
    ChosenTokens,
    Rows,
    StepKind,
    choose_tokens,
    forward,
    free_penalties,
    free_rows,
    row_of,
)
from keras_gemma.generation.prefill import MIN_CACHE_SLOTS, chunks, to_rings
from keras_gemma.generation.prefix_store import PrefixStore
from keras_gemma.generation.programs import ChunkedPrefill, Programs
from keras_gemma.model.cache import Cache, grow_cache, make_cache, slots_of_layers

ALL_ALLOWED = -1
"""Word of a mask that allows its 32 tokens."""


class RequestPrefill:
    """Prefill of one request. The first chunk allocates its cache."""

    def __init__(self, slots: "Slots", request: EngineRequest) -> None:
        self.request = request
        self.num_cached_tokens = 0
        self.logits: Any = None  # float32 [1, V], of the first new token
        self.chunked: ChunkedPrefill | None = None
        self._slots = slots

    @property
    def num_remaining_tokens(self) -> int:
        """Number of prompt tokens that are still to read; 0 at the end."""
        if self.chunked is None:
            return len(self.request.prompt)
        return self.chunked.num_remaining_tokens

    def read_chunk(self) -> None:
        """Reads the next chunk."""
        slots, prompt, salt = self._slots, self.request.prompt, self.request.cache_salt
        if self.chunked is None:
            self.num_cached_tokens, cache = slots.prefixes.lookup(prompt, salt)
            self.chunked = ChunkedPrefill(
                slots.programs, [prompt], slots.weights, self.num_cached_tokens, cache
            )
        self.chunked.read_chunk()
        if not self.num_remaining_tokens:
            self.logits = slots.programs.logits(self.chunked.hidden, slots.weights)
            slots.prefixes.store(prompt, salt, self.chunked.cache)


class Slots:
    """Decode state with one row per slot.

    Args:
        programs: Programs of the model. Its weights are read now.
        prefix_cache_bytes: Maximum size of the stored prefixes.
    """

    def __init__(self, programs: Programs, prefix_cache_bytes: int = 0) -> None:
        self.programs = programs
        self.weights = programs.backbone.tensors()
        (_, block_tokens), *_ = chunks(0, programs.config.context_length, 1)
        self.prefixes = PrefixStore(block_tokens, prefix_cache_bytes)
        self.clear(0)

    def clear(self, size: int) -> None:
        """Makes `size` free slots, with the smallest cache."""
        self.size, self.capacity = size, MIN_CACHE_SLOTS
        if size:
            self.rows = free_rows(size)
            config, dtype = self.programs.config, self.programs.backbone.compute_dtype
            self.cache = make_cache(config, size, slots_of_layers(config, self.capacity), dtype)

    def drop_prefixes(self) -> None:
        """Drops the stored prefixes, whose computation may have failed."""
        self.prefixes.clear()

    def prefill(self, request: EngineRequest) -> RequestPrefill:
        """Begins to read a prompt."""
        return RequestPrefill(self, request)

    def insert(
        self,
        slot: int,
        prefill: RequestPrefill,
        index: int,
        seed: int,
        kind: StepKind,
        mask: np.ndarray | None,
    ) -> ChosenTokens:
        """Chooses the first token of the sequence number `index` of a request, and fills a slot.

        Args:
            slot: A free slot.
            prefill: The prompt, read to its end.
            index: Number of the sequence.
            seed: Random seed of the request.
            kind: Kind of step that the request needs.
            mask: Allowed tokens of the sequence, int32 `[ceil(V / 32)]`, if it has a constraint.
        """
        row = row_of(prefill.request, index, seed, self.programs.config)
        row, chosen = self._choose(prefill.logits, row, kind, {} if mask is None else {0: mask})
        fresh = prefill.chunked.cache
        self._ensure_capacity(fresh[0][0].shape[1])
        at = backend.to_tensor(np.int32(slot))
        length = backend.to_tensor(prefill.chunked.lengths)
        self.cache = self._insert_program()(self.cache, fresh, length, at)
        size = self.programs.config.vocabulary_size
        if row.penalties is not None and self.rows.penalties is None:
            self.rows = self.rows._replace(penalties=free_penalties(self.size, size))
        if row.penalties is None and self.rows.penalties is not None:
            row = row._replace(penalties=free_penalties(1, size))
        self.rows = self._insert_rows_program()(self.rows, row, at)
        return _to_numpy(chosen)

    def decode(
        self,
        num_steps: int,
        max_length: int,
        kind: StepKind,
        masks: Mapping[int, np.ndarray],
    ) -> list[ChosenTokens]:
        """Chooses the next tokens of all slots that are not finished.

        Args:
            num_steps: Number of tokens per row; 1 if there are masks.
            max_length: Length of the longest unfinished row afterwards.
            kind: Kind of step that the rows need.
            masks: Allowed tokens by slot, of the sequences with a constraint.
        """
        self._ensure_capacity(max_length)
        results = []
        for _ in range(num_steps):
            logits, self.cache = self._forward_program()(
                self.weights, self.rows.token, self.rows.length, self.cache
            )
            self.rows, chosen = self._choose(logits, self.rows, kind, masks)
            results.append(chosen)
        return [_to_numpy(chosen) for chosen in results]

    def free(self, slot: int) -> None:
        """Marks a slot as finished."""
        done = ops.convert_to_numpy(self.rows.done).copy()
        done[slot] = True
        self.rows = self.rows._replace(done=backend.to_tensor(done))

    def resize(self, size: int, kept: Sequence[int]) -> None:
        """Changes the number of slots. The rows `kept` move to the first slots, in this order."""
        if not kept:
            return self.clear(size)
        source = np.zeros(size, "int32")
        source[: len(kept)] = kept
        is_free = np.arange(size) >= len(kept)
        indices = backend.to_tensor(source)
        self.rows, self.cache = keras.tree.map_structure(
            lambda array: None if array is None else ops.take(array, indices, axis=0),
            (self.rows, self.cache),
        )
        done = ops.logical_or(self.rows.done, backend.to_tensor(is_free))
        self.rows, self.size = self.rows._replace(done=done), size
        return None

    def _choose(
        self, logits: Any, rows: Rows, kind: StepKind, masks: Mapping[int, np.ndarray]
    ) -> tuple[Rows, ChosenTokens]:
        allowed = None
        if kind.mask:
            batch, size = logits.shape
            words = np.full((batch, -(-size // 32)), ALL_ALLOWED, "int32")
            for slot, mask in masks.items():
                words[slot] = mask
            allowed = backend.to_tensor(words)
        program = self.programs.program(
            ("choose", kind),
            lambda: backend.compile_step(
                lambda logits, rows, allowed: choose_tokens(logits, rows, allowed, kind)
            ),
        )
        return program(logits, rows, allowed)

    def _forward_program(self) -> Any:
        config, functions = self.programs.config, self.programs.functions

        def program(weights: Any, token: Any, length: Any, cache: Cache) -> tuple[Any, Cache]:
            return forward(weights, token, length, cache, config, functions)

        return self.programs.program("forward", lambda: backend.compile_step(program, donate=3))

    def _insert_program(self) -> Any:
        config, capacity = self.programs.config, self.capacity

        def program(cache: Cache, fresh: Cache, lengths: Any, at: Any) -> Cache:
            rings = to_rings(fresh, lengths, config, capacity)
            return keras.tree.map_structure(
                lambda array, row: backend.insert_row(array, row, at), cache, rings
            )

        return self.programs.program(
            ("insert", capacity), lambda: backend.compile(program, donate=0)
        )

    def _insert_rows_program(self) -> Any:
        def program(rows: Rows, row: Rows, at: Any) -> Rows:
            return keras.tree.map_structure(
                lambda array, new: None if new is None else backend.insert_row(array, new, at),
                rows,
                row,
            )

        return self.programs.program("insert rows", lambda: backend.compile(program, donate=0))

    def _ensure_capacity(self, length: int) -> None:
        if length > self.capacity:
            self.capacity = bucket(length)
            slots = slots_of_layers(self.programs.config, self.capacity)
            self.cache = grow_cache(self.cache, slots)


def _to_numpy(chosen: ChosenTokens) -> ChosenTokens:
    return ChosenTokens(*(None if a is None else ops.convert_to_numpy(a) for a in chosen))

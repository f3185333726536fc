"""Model of the scheduler's tests: slots whose tokens are a function of the request."""

import numpy as np

from keras_gemma.generation.engine_request import EngineRequest
from keras_gemma.generation.engine_step import ChosenTokens

CHUNK = 4
"""Prompt tokens per chunk."""


def token(request: EngineRequest, index: int, position: int) -> int:
    """Returns the token number `position` of a sequence."""
    return (int(request.prompt.sum()) * 31 + index * 7 + position * 13) % 97


def tokens(request: EngineRequest, index: int) -> list[int]:
    """Returns all tokens of a sequence, up to its stop token or length."""
    ids = []
    for position in range(request.max_new_tokens):
        ids.append(token(request, index, position))
        if ids[-1] in request.stop_token_ids:
            break
    return ids


class FakePrefill:
    def __init__(self, model: "FakeModel", request: EngineRequest) -> None:
        self.model, self.request = model, request
        self.num_cached_tokens = 0
        self.num_remaining_tokens = len(request.prompt)

    def read_chunk(self) -> None:
        self.model.fail_if_told("chunk")
        self.model.chunks.append(self.request)
        self.num_remaining_tokens = max(0, self.num_remaining_tokens - CHUNK)


class FakeModel:
    """Decode state with slots, which checks that it is used as `Slots` may be."""

    def __init__(self) -> None:
        self.rows: list[list | None] = []  # [request, index, number of tokens]; None if free
        self.chunks: list[EngineRequest] = []
        self.sizes: list[int] = []
        self.num_drops = 0
        self.failing: dict[str, int] = {}  # number of calls, by name, until one fails

    @property
    def size(self) -> int:
        return len(self.rows)

    def fail_if_told(self, call: str) -> None:
        if call in self.failing:
            self.failing[call] -= 1
            if self.failing[call] < 0:
                del self.failing[call]
                raise RuntimeError(f"{call} failed")

    def clear(self, size: int) -> None:
        self.fail_if_told("clear")
        self.rows = [None] * size

    def drop_prefixes(self) -> None:
        self.num_drops += 1

    def prefill(self, request: EngineRequest) -> FakePrefill:
        return FakePrefill(self, request)

    def insert(self, slot, prefill, index, seed, kind, mask) -> ChosenTokens:
        self.fail_if_told("insert")
        assert not prefill.num_remaining_tokens
        assert self.rows[slot] is None or self.is_done(slot)
        self.rows[slot] = [prefill.request, index, 0]
        return ChosenTokens(self.next_ids([slot])[[slot]])

    def decode(self, num_steps, max_length, kind, masks) -> list[ChosenTokens]:
        self.fail_if_told("decode")
        self.sizes.append(self.size)
        lengths = [
            len(row[0].prompt) + min(row[2] + num_steps, row[0].max_new_tokens)
            for slot, row in enumerate(self.rows)
            if row is not None and not self.is_done(slot)
        ]
        assert max_length == max(lengths)
        return [ChosenTokens(self.next_ids(range(self.size))) for _ in range(num_steps)]

    def free(self, slot: int) -> None:
        self.fail_if_told("free")
        assert self.rows[slot] is not None
        self.rows[slot] = None

    def resize(self, size: int, kept: list[int]) -> None:
        self.fail_if_told("resize")
        rows = [self.rows[slot] for slot in kept]
        self.rows = [*rows, *[None] * (size - len(rows))]

    def is_done(self, slot: int) -> bool:
        request, index, count = self.rows[slot]
        return count == len(tokens(request, index))

    def next_ids(self, slots) -> np.ndarray:
        ids = np.full(self.size, -1)
        for slot in slots:
            if self.rows[slot] is not None and not self.is_done(slot):
                request, index, count = self.rows[slot]
                ids[slot] = token(request, index, count)
                self.rows[slot][2] += 1
        return ids

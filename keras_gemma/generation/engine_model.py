"""Interface of the model for the scheduler, which `slots.Slots` and the tests implement."""

from typing import Any, Protocol

import numpy as np

from keras_gemma.generation.engine_request import EngineRequest
from keras_gemma.generation.engine_step import ChosenTokens, StepKind


class Prefill(Protocol):
    """Prompt in progress, as `slots.RequestPrefill`."""

    num_cached_tokens: int

    @property
    def num_remaining_tokens(self) -> int: ...

    def read_chunk(self) -> None: ...


class Model(Protocol):
    """Decode state with slots, as `slots.Slots`."""

    size: int

    def clear(self, size: int) -> None: ...

    def drop_prefixes(self) -> None: ...

    def prefill(self, request: EngineRequest) -> Prefill: ...

    def insert(
        self,
        slot: int,
        prefill: Any,
        index: int,
        seed: int,
        kind: StepKind,
        mask: np.ndarray | None,
    ) -> ChosenTokens: ...

    def decode(
        self,
        num_steps: int,
        max_length: int,
        kind: StepKind,
        masks: dict[int, np.ndarray],
    ) -> list[ChosenTokens]: ...

    def free(self, slot: int) -> None: ...

    def resize(self, size: int, kept: list[int]) -> None: ...

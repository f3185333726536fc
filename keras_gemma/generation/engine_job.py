"""State of a request in the scheduler: its sequences, its prompt in progress, and its times."""

import dataclasses
import random
from collections.abc import Callable

import numpy as np

from keras_gemma.generation.engine_model import Prefill
from keras_gemma.generation.engine_request import (
    EngineOutput,
    EngineRequest,
    TokenConstraint,
)
from keras_gemma.generation.engine_step import kind_of


@dataclasses.dataclass
class Timings:
    """Times of a request on the scheduler's clock, in seconds; `None` if not reached."""

    arrival: float
    prefill_start: float | None = None
    first_token: float | None = None
    finish: float | None = None


class SequenceState:
    """One sequence of a request."""

    def __init__(self, job: "Job", index: int) -> None:
        self.job, self.index = job, index
        self.slot: int | None = None
        self.num_new_tokens = 0
        self.is_finished = False
        self.is_cancelled = False  # True if it is to end in the next turn
        self.is_stopped = False  # True if it ends because its text is complete
        self.constraint: TokenConstraint | None = None
        self.last_id = -1

    def begin_constraint(self) -> np.ndarray | None:
        """Makes the constraint, and returns the allowed first tokens. `None` allows all."""
        if self.job.request.constraint is None:
            return None
        self.constraint = self.job.request.constraint()
        return self.constraint.allowed()


class Job:
    """A request in the scheduler, from its arrival to its last output."""

    def __init__(
        self, request: EngineRequest, send: Callable[[EngineOutput], None], arrival: float
    ) -> None:
        self.request, self.send = request, send
        self.kind = kind_of(request)
        self.seed = random.getrandbits(32) if request.seed is None else request.seed
        self.timings = Timings(arrival)
        self.sequences = [SequenceState(self, i) for i in range(request.num_return_sequences)]
        self.prefill: Prefill | None = None
        self.num_cached_tokens = 0

    @property
    def num_tokens(self) -> int:
        """Prompt tokens that count against the limit of the queue."""
        return len(self.request.prompt) * len(self.sequences)

    @property
    def waiting(self) -> list[SequenceState]:
        """Sequences without a slot."""
        return [s for s in self.sequences if s.slot is None and not s.is_finished]

    @property
    def is_finished(self) -> bool:
        """True if all sequences are finished."""
        return all(sequence.is_finished for sequence in self.sequences)

    @property
    def is_read(self) -> bool:
        """True if the whole prompt is read."""
        return self.prefill is not None and not self.prefill.num_remaining_tokens

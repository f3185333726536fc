"""Turns of the engine: which prompt is read next, which slot it gets, and what comes back.

A turn

    1. frees the slots of cancelled sequences
    2. begins to read waiting prompts, one for each free slot
    3. reads one chunk of one of them
    4. gives the prompts that are read to their slots
    5. makes decode steps in all slots

so a long prompt delays the tokens of others by one chunk at a time. A sequence keeps its slot to
its end. Knows no tensors and no threads: model and clock are arguments.
"""

import dataclasses
import logging
from collections import deque
from collections.abc import Callable

import numpy as np

from keras_gemma.generation.engine_job import Job, SequenceState
from keras_gemma.generation.engine_model import Model
from keras_gemma.generation.engine_request import (
    EngineOutput,
    FinishReason,
    QueueFullError,
)
from keras_gemma.generation.engine_stats import EngineStats
from keras_gemma.generation.engine_step import ChosenTokens, StepKind

logger = logging.getLogger(__name__)

OLDEST_EVERY = 4
"""Chunks among which at least one is of the oldest prompt that is not read yet."""

TURNS_BEFORE_SHRINKING = 8
"""Turns with few sequences after which the number of slots shrinks, which copies the cache."""


class Scheduler:
    """Queue, prompts in progress and slots.

    Args:
        model: The slots.
        batch_sizes: Numbers of slots that the model may have, in ascending order.
        max_queued_requests: Maximum number of waiting requests.
        max_queued_tokens: Maximum number of their prompt tokens.
        steps_per_turn: Decode steps of a turn.
        clock: Function that returns the time in seconds.
    """

    def __init__(
        self,
        model: Model,
        batch_sizes: tuple[int, ...],
        max_queued_requests: int,
        max_queued_tokens: int,
        steps_per_turn: int,
        clock: Callable[[], float],
    ) -> None:
        self.model, self.batch_sizes, self.clock = model, batch_sizes, clock
        self.max_queued_requests = max_queued_requests
        self.max_queued_tokens = max_queued_tokens
        self.steps_per_turn = steps_per_turn
        self.queue: deque[Job] = deque()
        self.reading: list[Job] = []  # in order of arrival, until all sequences have a slot
        self.slots: list[SequenceState | None] = []
        self.stats = EngineStats(slots_total=batch_sizes[-1])
        self._failures = {"prefill": 0, "slots": 0, "decode": 0}
        self._stage = "slots"  # part of the turn that is running
        self._num_passed = 0  # chunks in a row that were not of the oldest prompt
        self._turns_with_few = 0
        self._clear()

    @property
    def failures(self) -> int:
        """Number of times in a row that a part of the model's work has failed."""
        return max(self._failures.values())

    @property
    def has_work(self) -> bool:
        """True if a turn would do something."""
        return bool(self.queue or self.reading or any(self.slots))

    def check_queue(self, job: Job, arrivals: list[Job]) -> None:
        """Raises a QueueFullError if the queue has no space for `job` after the `arrivals`.

        An empty queue takes a request of any number of tokens.
        """
        waiting = [*self.queue, *arrivals]
        tokens = sum(other.num_tokens for other in waiting)
        if len(waiting) >= self.max_queued_requests or (
            waiting and tokens + job.num_tokens > self.max_queued_tokens
        ):
            raise QueueFullError(
                f"The queue is full: {len(waiting)} requests with {tokens} prompt tokens wait, of "
                f"at most {self.max_queued_requests} and {self.max_queued_tokens}. Try again later."
            )

    def add(self, job: Job) -> None:
        """Appends a job to the queue."""
        self.queue.append(job)

    def turn(self) -> None:
        """Makes one turn. Outputs go to the `send` of their jobs.

        An exception of the model ends the sequences that it touched: those of one prompt, or those
        in the slots, which are empty afterwards. The others continue.
        """
        start = self.clock()
        try:
            self._stage = "slots"
            self._drop_cancelled()
            self._begin_prefills()
            self._read_chunk()
            self._fill_slots()
            self._stage = "decode"
            self._decode()
            self._stage = "slots"
            self._shrink()
        except Exception as error:
            self._fail_slots(error)
        self.stats.step_seconds += self.clock() - start

    def fail_all(self, error: Exception) -> None:
        """Ends all sequences with an error. The model is left as it is."""
        jobs = [*self.queue, *self.reading, *(s.job for s in self.slots if s)]
        self.queue.clear()
        self.reading.clear()
        for job in dict.fromkeys(jobs):
            self._end(job.sequences, "error", error)

    def update_stats(self) -> EngineStats:
        """Returns the numbers, with those of now."""
        # Copies, because the engine's thread changes them.
        queue, reading, slots = tuple(self.queue), tuple(self.reading), tuple(self.slots)
        return dataclasses.replace(
            self.stats,
            num_running=len(dict.fromkeys([*reading, *(s.job for s in slots if s)])),
            num_waiting=len(queue),
            num_waiting_tokens=sum(job.num_tokens for job in queue),
            slots_used=sum(s is not None for s in slots),
        )

    def _drop_cancelled(self) -> None:
        for job in [*self.queue, *self.reading]:
            self._cancel([s for s in job.waiting if s.is_cancelled])
        for slot, sequence in enumerate(self.slots):
            if sequence is not None and sequence.is_cancelled:
                self.model.free(slot)
                self._cancel([sequence])
        self.queue = deque(job for job in self.queue if not job.is_finished)
        self._keep_unfinished_readings()

    def _cancel(self, sequences: list[SequenceState]) -> None:
        for sequence in sequences:
            self._end([sequence], "stop" if sequence.is_stopped else "cancelled")

    def _keep_unfinished_readings(self) -> None:
        self.reading = [job for job in self.reading if job.waiting]

    def _begin_prefills(self) -> None:
        used = sum(s is not None for s in self.slots)
        while self.queue and used + len(self.reading) < self.batch_sizes[-1]:
            job = self.queue.popleft()
            job.timings.prefill_start = self.clock()
            job.prefill = self.model.prefill(job.request)
            self.reading.append(job)

    def _read_chunk(self) -> None:
        """Reads a chunk of the prompt with the fewest tokens left, or of the oldest one.

        Short prompts do not wait for a long one, which still gets one of `OLDEST_EVERY` chunks.
        """
        unread = [job for job in self.reading if not job.is_read]
        if not unread:
            return
        job = min(unread, key=lambda job: job.prefill.num_remaining_tokens)
        self._num_passed = self._num_passed + 1 if job is not unread[0] else 0
        if self._num_passed == OLDEST_EVERY:
            job, self._num_passed = unread[0], 0
        try:
            job.prefill.read_chunk()
        except Exception as error:
            self._log_failure("prefill", error)
            self.model.drop_prefixes()
            self._end(job.sequences, "error", error)
            self._keep_unfinished_readings()
            return
        self._failures["prefill"] = 0
        if job.is_read:
            job.num_cached_tokens = job.prefill.num_cached_tokens
            self.stats.prompt_tokens += len(job.request.prompt)
            self.stats.prefix_cache_queries += len(job.request.prompt)
            self.stats.prefix_cache_hits += job.num_cached_tokens

    def _fill_slots(self) -> None:
        ready = [s for job in self.reading if job.is_read for s in job.waiting]
        if not ready:
            return
        self._grow(sum(s is not None for s in self.slots) + len(ready))
        free = [slot for slot, sequence in enumerate(self.slots) if sequence is None]
        for slot, sequence in zip(free, ready, strict=False):
            job = sequence.job
            try:
                mask = sequence.begin_constraint()
            except Exception as error:
                self._fail_constraint(sequence, error)
                continue
            try:
                chosen = self.model.insert(
                    slot, job.prefill, sequence.index, job.seed, job.kind, mask
                )
            except Exception as error:
                self._end(job.sequences, "error", error)
                raise
            self._failures["slots"] = 0
            sequence.slot, self.slots[slot] = slot, sequence
            if job.timings.first_token is None:
                job.timings.first_token = self.clock()
            self._accept(sequence, [chosen], 0)
        for job in self.reading:
            if not job.waiting:
                job.prefill = None
        self._keep_unfinished_readings()

    def _decode(self) -> None:
        masks = self._masks()
        live = {slot: s for slot, s in enumerate(self.slots) if s is not None}
        if not live:
            return
        kind = StepKind()
        for sequence in live.values():
            kind = kind | sequence.job.kind
        longest = max(_remaining(s) for s in live.values())
        steps = 1 if masks else min(self.steps_per_turn, longest)
        length = max(
            len(s.job.request.prompt) + s.num_new_tokens + min(steps, _remaining(s))
            for s in live.values()
        )
        results = self.model.decode(steps, length, kind, masks)
        self._failures = dict.fromkeys(self._failures, 0)
        self.stats.num_steps += len(results)
        for slot, sequence in live.items():
            self._accept(sequence, results, slot)

    def _masks(self) -> dict[int, np.ndarray]:
        """Returns the allowed tokens of the sequences with a constraint, by slot.

        A sequence whose constraint fails ends.
        """
        masks = {}
        for slot, sequence in enumerate(self.slots):
            if sequence is None or sequence.constraint is None:
                continue
            try:
                sequence.constraint.accept(sequence.last_id)
                masks[slot] = sequence.constraint.allowed()
            except Exception as error:
                self.model.free(slot)
                self._fail_constraint(sequence, error)
        return masks

    def _fail_constraint(self, sequence: SequenceState, error: Exception) -> None:
        logger.error("A constraint failed. Its sequence ends with this error.", exc_info=error)
        self._end([sequence], "error", error)

    def _accept(self, sequence: SequenceState, results: list[ChosenTokens], row: int) -> None:
        """Sends the tokens of one row, and ends the sequence if they do."""
        request = sequence.job.request
        results = [chosen for chosen in results if chosen.ids[row] >= 0]
        ids = [int(chosen.ids[row]) for chosen in results]
        sequence.num_new_tokens += len(ids)
        self.stats.generation_tokens += len(ids)
        reason: FinishReason | None = None
        if ids[-1] in request.stop_token_ids:
            reason = "stop"
        elif sequence.num_new_tokens >= request.max_new_tokens:
            reason = "length"
        sequence.last_id = ids[-1]
        arrays = {}
        if request.top_logprobs is not None:
            n = request.top_logprobs
            arrays["logprobs"] = np.array([c.logprobs[row] for c in results], "float32")
            arrays["top_ids"] = np.stack([c.top_ids[row, :n] for c in results])
            arrays["top_logprobs"] = np.stack([c.top_logprobs[row, :n] for c in results])
        self._release(sequence, reason)
        sequence.job.send(EngineOutput(sequence.index, ids, **arrays, finish_reason=reason))

    def _release(self, sequence: SequenceState, reason: FinishReason | None) -> None:
        if reason is None:
            return
        sequence.is_finished = True
        if sequence.slot is not None:
            self.slots[sequence.slot] = None
            sequence.slot = None
        if sequence.job.is_finished:
            sequence.job.timings.finish = self.clock()
            sequence.job.prefill = None

    def _end(
        self, sequences: list[SequenceState], reason: FinishReason, error: Exception | None = None
    ) -> None:
        """Ends sequences without a token."""
        for sequence in sequences:
            if sequence.is_finished:
                continue
            self._release(sequence, reason)
            self.stats.num_cancelled += reason == "cancelled" and sequence.job.is_finished
            sequence.job.send(EngineOutput(sequence.index, [], finish_reason=reason, error=error))

    def _fail_slots(self, error: Exception) -> None:
        self._log_failure(self._stage, error)
        failed = [sequence for sequence in self.slots if sequence is not None]
        self._end(failed, "error", error)
        self._keep_unfinished_readings()
        self.stats.num_restarts += 1
        self.model.drop_prefixes()
        self._clear()

    def _log_failure(self, stage: str, error: Exception) -> None:
        self._failures[stage] += 1
        logger.error("The model failed. Its requests end with this error.", exc_info=error)

    def _clear(self) -> None:
        self.slots = [None] * self.batch_sizes[0]
        self.model.clear(self.batch_sizes[0])

    def _grow(self, needed: int) -> None:
        size = next((n for n in self.batch_sizes if n >= needed), self.batch_sizes[-1])
        if size > len(self.slots):
            self._resize(size)

    def _shrink(self) -> None:
        """Reduces the number of slots after some turns in which fewer would do."""
        used = sum(s is not None for s in self.slots) + len(self.reading) + len(self.queue)
        size = next((n for n in self.batch_sizes if n >= used), self.batch_sizes[-1])
        self._turns_with_few = self._turns_with_few + 1 if size < len(self.slots) else 0
        if not used or self._turns_with_few >= TURNS_BEFORE_SHRINKING:
            self._turns_with_few = 0
            if not used:
                self._clear()
            else:
                self._resize(size)

    def _resize(self, size: int) -> None:
        kept = [slot for slot, sequence in enumerate(self.slots) if sequence is not None]
        self.model.resize(size, kept)
        live = [self.slots[slot] for slot in kept]
        self.slots = [*live, *[None] * (size - len(live))]
        for slot, sequence in enumerate(live):
            sequence.slot = slot


def _remaining(sequence: SequenceState) -> int:
    return sequence.job.request.max_new_tokens - sequence.num_new_tokens

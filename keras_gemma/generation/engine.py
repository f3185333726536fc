"""Continuous batching: requests come at any time, and are decoded together.

    engine = lm.engine(max_batch_size=8)
    handle = engine.add_request(EngineRequest(ids, max_new_tokens=64))
    while engine.has_work:
        engine.step()

or, with a thread of its own, `engine.start()`, and `async for output in handle` in a server. One
thread at a time makes steps, and all work on the device is done there. Deals only in ids.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Generic, TypeVar

import keras
import numpy as np

from keras_gemma import backend
from keras_gemma.buckets import bucket
from keras_gemma.checks import check_integer
from keras_gemma.config import BYTES_PER_ELEMENT
from keras_gemma.generation.engine_request import (
    EngineOutput,
    EngineRequest,
    EngineStoppedError,
    QueueFullError,
)
from keras_gemma.generation.engine_stats import EngineStats
from keras_gemma.generation.memory import CACHE_COPIES, MARGIN
from keras_gemma.generation.programs import Programs
from keras_gemma.generation.request_handle import RequestHandle
from keras_gemma.generation.scheduler import Scheduler
from keras_gemma.generation.slots import Slots

logger = logging.getLogger(__name__)

T = TypeVar("T")

DEFAULT_BATCH_SIZE = 8
DEFAULT_QUEUED_REQUESTS = 128

PREFIX_CACHE_DIVISOR = 8
"""Divisor of the free memory: by default, stored prefixes take at most this part of it."""

MAX_PREFIX_CACHE_BYTES = 8 << 30
"""Default limit of the stored prefixes, whatever the memory."""

STOP_SECONDS = 10.0
"""Maximum wait for the turn that runs when the engine is stopped."""

MAX_FAILURES = 3
"""Failures without a decode step between them after which the engine stops."""

MAX_SILENCE = 300.0
"""Seconds without a turn, while there is work, after which the engine is not healthy.

The longest turns are those that compile a program."""

MAX_RETRY_SECONDS = 60.0
"""Longest advice to wait for a full queue."""


class Engine:
    """Continuous batching over the slots of one model, created by `GemmaCausalLM.engine`.

    A prompt is prefilled by itself, and its sequences are then decoded together with others. A
    request with a seed gives the same tokens whatever else runs, up to rounding: in float32 those
    of `generate`, and with `pinned` the same bits under any load in bfloat16.

    Args:
        programs: Programs of the model. Its weights are read now: create another engine after
            training.
        max_batch_size: Maximum number of sequences that are decoded together.
        max_length: Maximum number of tokens per sequence, including the prompt. `None` uses the
            context length.
        max_queued_requests: Maximum number of waiting requests.
        max_queued_tokens: Maximum number of their prompt tokens. `None` allows eight times
            `max_length` for each slot.
        prefix_cache_bytes: Maximum size of the stored beginnings of prompts. 0 disables them.
            `None` allows an eighth of the free memory, and at most 8 GiB.
        pinned: If True, always computes `max_batch_size` rows. If False, computes as few as the
            current load needs, which is faster under low load.
        steps_per_turn: Decode steps between two looks at the queue. `None` makes 1 on CPU, and 8
            on an accelerator.
        clock: Function that returns the time in seconds.

    Raises:
        ValueError: If an argument is out of range, or the slots do not fit into memory.
    """

    def __init__(
        self,
        programs: Programs,
        max_batch_size: int = DEFAULT_BATCH_SIZE,
        max_length: int | None = None,
        max_queued_requests: int = DEFAULT_QUEUED_REQUESTS,
        max_queued_tokens: int | None = None,
        prefix_cache_bytes: int | None = None,
        pinned: bool = False,
        steps_per_turn: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        check_integer("max_batch_size", max_batch_size, 1, 1024)
        check_integer("max_queued_requests", max_queued_requests)
        if prefix_cache_bytes is None:
            free = (backend.free_memory() or 0) // PREFIX_CACHE_DIVISOR
            prefix_cache_bytes = min(free, MAX_PREFIX_CACHE_BYTES)
        check_integer("prefix_cache_bytes", prefix_cache_bytes, 0)
        context = programs.config.context_length
        if max_length is not None:
            check_integer("max_length", max_length, 2, context)
        if max_queued_tokens is not None:
            check_integer("max_queued_tokens", max_queued_tokens)
        if steps_per_turn is None:
            steps_per_turn = 1 if backend.peak_device_memory() is None else 8
        check_integer("steps_per_turn", steps_per_turn)
        self.config = programs.config
        self.max_length = max_length or context
        self.max_batch_size, self.is_pinned, self.clock = max_batch_size, pinned, clock
        self.max_queued_requests = max_queued_requests
        _check_memory(programs, max_batch_size, self.max_length, prefix_cache_bytes)
        self._slots = Slots(programs.without_limit(), prefix_cache_bytes)
        self._scheduler = Scheduler(
            self._slots,
            (max_batch_size,) if pinned else batch_sizes(max_batch_size),
            max_queued_requests,
            max_queued_tokens or 8 * max_batch_size * self.max_length,
            steps_per_turn,
            clock,
        )
        self._lock = threading.Condition()
        self._arrivals: list[RequestHandle] = []
        self._parts: deque[PartialWork] = deque()
        self._notified: dict[asyncio.AbstractEventLoop, set[asyncio.Event]] = {}
        self._thread: threading.Thread | None = None
        self._refusal: str | None = None  # why no request is accepted
        self._is_stopping = False
        self._last_turn = clock()

    def add_request(
        self,
        request: EngineRequest,
        on_output: Callable[[EngineOutput], None] | None = None,
    ) -> RequestHandle:
        """Appends a request to the queue. Thread-safe.

        Args:
            request: The request.
            on_output: Function that is called with each output on the thread of the engine, which
                it must not block. `None` keeps the outputs for the handle.

        Raises:
            ValueError: If the model cannot answer the request.
            QueueFullError: If too many requests or tokens wait.
            EngineStoppedError: If the engine accepts no more requests.
        """
        request.check(self.config, self.max_length)
        handle = RequestHandle(self, request, on_output)
        with self._lock:
            self._check_accepting()
            arrivals = [waiting.job for waiting in self._arrivals]
            try:
                self._scheduler.check_queue(handle.job, arrivals)
            except QueueFullError as error:
                error.retry_after = self._retry_after()
                raise
            if self._idle():
                self._last_turn = self.clock()
            self._arrivals.append(handle)
            self._lock.notify_all()
        return handle

    @property
    def has_work(self) -> bool:
        """True if a step would do something."""
        with self._lock:
            return not self._idle()

    def step(self) -> None:
        """Makes one turn: at most one chunk of a prompt, and a few tokens for each sequence."""
        with self._lock:
            work = self._parts[0] if self._parts else None
            for handle in self._arrivals:
                self._scheduler.add(handle.job)
            self._arrivals = []
        if work is not None and work.advance():
            self._parts.popleft()
        self._scheduler.turn()
        self._last_turn = self.clock()
        self._notify()
        if self._scheduler.failures >= MAX_FAILURES:
            self._refuse("The engine has stopped, because the model failed three times in a row.")
            self._end_all()

    def start(self) -> None:
        """Starts a thread that makes steps while there is work."""
        if self._thread is None:
            backend.release_threads()  # those of the thread that has loaded the model
            self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
            self._thread.start()

    def drain(self, timeout: float) -> None:
        """Refuses new requests, and waits until the accepted ones have ended.

        Args:
            timeout: Maximum wait in seconds. Requests that have not ended then end with an
                `EngineStoppedError`.
        """
        self._refuse("The engine is shutting down.")
        deadline = time.monotonic() + timeout
        while self.has_work and self.is_alive and time.monotonic() < deadline:
            time.sleep(0.01)
        self.stop()

    def stop(self) -> None:
        """Ends all requests with an `EngineStoppedError`, and the thread."""
        self._refuse("The engine has stopped.")
        with self._lock:
            self._is_stopping = True
            self._lock.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(STOP_SECONDS)
        self._end_all()

    def run_parts(self, parts: Iterator[T]) -> "Future[list[T]]":
        """Advances an iterator by one item in each turn, on the thread of the engine. Thread-safe.

        For work on the device that is not generation, such as scoring: decode steps continue
        between its parts, and one iterator runs at a time. Cancelling the future ends it.

        Returns:
            The future of all items.

        Raises:
            QueueFullError: If as many iterators wait as requests may.
            EngineStoppedError: If the engine accepts no more work.
        """
        work = PartialWork(parts)
        with self._lock:
            self._check_accepting()
            if len(self._parts) >= self.max_queued_requests:
                raise QueueFullError(
                    f"The queue is full: {len(self._parts)} prompts wait to be scored, the "
                    "maximum. Try again later."
                )
            if self._idle():
                self._last_turn = self.clock()
            self._parts.append(work)
            self._lock.notify_all()
        return work.future

    def stats(self) -> EngineStats:
        """Returns the numbers of now and the totals since the start."""
        stats = self._scheduler.update_stats()
        stats.num_waiting += len(self._arrivals)
        stats.prefix_cache_bytes = self._slots.prefixes.num_bytes
        return stats

    @property
    def is_alive(self) -> bool:
        """True if the engine's thread runs."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def is_accepting(self) -> bool:
        """True if `add_request` accepts requests while the queue has space."""
        return self._refusal is None

    @property
    def is_healthy(self) -> bool:
        """True if the thread runs, and makes turns while there is work."""
        with self._lock:
            silence = 0.0 if self._idle() else self.clock() - self._last_turn
        is_broken = self._scheduler.failures >= MAX_FAILURES
        return self.is_alive and not is_broken and silence < MAX_SILENCE

    def wake(self) -> None:
        """Makes the engine's thread look for work. Thread-safe."""
        with self._lock:
            self._lock.notify_all()

    def notify(self, loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
        """Sets an event of an asyncio loop at the end of the turn."""
        self._notified.setdefault(loop, set()).add(event)

    def _run(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._is_stopping or not self._idle())
                if self._is_stopping:
                    return
            try:
                self.step()
            except Exception as error:  # a fault of the engine itself, which cannot continue
                logger.exception("The engine has failed")
                self._refuse(f"The engine has failed: {error}")
                self._end_all()
                return

    def _idle(self) -> bool:
        return not (self._arrivals or self._parts or self._scheduler.has_work)

    def _refuse(self, reason: str) -> None:
        with self._lock:
            self._refusal = reason

    def _check_accepting(self) -> None:
        if self._refusal is not None:
            raise EngineStoppedError(self._refusal)

    def _end_all(self) -> None:
        error = EngineStoppedError(self._refusal)
        with self._lock:
            for handle in self._arrivals:
                self._scheduler.add(handle.job)
            parts, self._parts, self._arrivals = self._parts, deque(), []
        self._scheduler.fail_all(error)
        self._notify()
        for work in parts:
            work.fail(error)

    def _notify(self) -> None:
        notified, self._notified = self._notified, {}
        for loop, events in notified.items():
            # A loop that has been closed has no one who waits.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_set_all, events)

    def _retry_after(self) -> float:
        """Returns the seconds after which the queue probably has space."""
        stats = self._scheduler.stats
        tokens = stats.prompt_tokens + stats.generation_tokens
        if not tokens:
            return 1.0
        waiting = sum(
            job.num_tokens + job.request.max_new_tokens * len(job.sequences)
            for job in list(self._scheduler.queue)
        )
        return float(np.clip(waiting / tokens * stats.step_seconds, 1.0, MAX_RETRY_SECONDS))


def batch_sizes(largest: int) -> tuple[int, ...]:
    """Returns the powers of two below `largest`, and `largest`."""
    sizes = [1]
    while 2 * sizes[-1] < largest:
        sizes.append(2 * sizes[-1])
    return tuple(dict.fromkeys([*sizes, largest]))


def _set_all(events: set[asyncio.Event]) -> None:
    for event in events:
        event.set()


def _check_memory(programs: Programs, batch: int, length: int, prefix_bytes: int) -> None:
    """Raises a ValueError if the slots, a prompt in progress and the prefixes do not fit."""
    copies = 1 + CACHE_COPIES[keras.config.backend()]
    config, dtype = programs.config, programs.backbone.compute_dtype
    slots = copies * config.cache_bytes(batch, bucket(length), dtype)
    per_token = 2 * config.num_key_value_heads * config.head_dim * BYTES_PER_ELEMENT[dtype]
    prompt = copies * config.num_layers * bucket(length) * per_token
    needed = int(MARGIN * (slots + prompt)) + prefix_bytes
    free = backend.free_memory()
    if free is not None and needed > free:
        raise ValueError(
            f"{batch} sequences of {length} tokens need about {needed / 1e9:.1f} GB for keys and "
            f"values, but only {free / 1e9:.1f} GB are free. Pass a smaller `max_batch_size`, "
            f"`max_length` or `prefix_cache_bytes`. Received: max_batch_size={batch}, "
            f"max_length={length}, prefix_cache_bytes={prefix_bytes}"
        )


class PartialWork(Generic[T]):
    """An iterator that the engine advances, and the future of its items."""

    def __init__(self, parts: Iterator[T]) -> None:
        self.parts, self.items = parts, list[T]()
        self.future: Future[list[T]] = Future()

    def advance(self) -> bool:
        """Gets one item. Returns True at the end."""
        if self.future.cancelled():
            return True
        try:
            self.items.append(next(self.parts))
        except StopIteration:
            self._end(lambda: self.future.set_result(self.items))
        except Exception as error:  # reaches the caller
            self.fail(error)
        else:
            return False
        return True

    def fail(self, error: Exception) -> None:
        """Ends the work with an error."""
        self._end(lambda: self.future.set_exception(error))

    def _end(self, set_value: Callable[[], None]) -> None:
        if self.future.set_running_or_notify_cancel():
            set_value()

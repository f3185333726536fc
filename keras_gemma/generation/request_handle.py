"""A request that an engine has accepted: its outputs, on any thread or in an event loop."""

import asyncio
import logging
import queue
from collections.abc import AsyncIterator, Callable
from typing import Protocol

import numpy as np

from keras_gemma.generation.engine_job import Job, Timings
from keras_gemma.generation.engine_request import EngineOutput, EngineRequest

logger = logging.getLogger(__name__)


class Notifier(Protocol):
    """Engine, as a handle sees it."""

    clock: Callable[[], float]

    def wake(self) -> None: ...

    def notify(self, loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None: ...


class RequestHandle:
    """A request that an engine has accepted.

    Iterate over it in an asyncio loop, or call `result`, but not both.
    """

    def __init__(
        self,
        engine: Notifier,
        request: EngineRequest,
        on_output: Callable[[EngineOutput], None] | None,
    ) -> None:
        self.request = request
        self._engine, self._on_output = engine, on_output
        self._outputs: queue.SimpleQueue[EngineOutput] = queue.SimpleQueue()
        self._listener: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
        self.job = Job(request, self._send, engine.clock())

    @property
    def seed(self) -> int:
        """Random seed that is used."""
        return self.job.seed

    @property
    def num_cached_tokens(self) -> int:
        """Number of prompt tokens whose keys and values were stored."""
        return self.job.num_cached_tokens

    @property
    def timings(self) -> Timings:
        """Times of the request, on the engine's clock."""
        return self.job.timings

    def cancel(self, index: int | None = None) -> None:
        """Ends the sequence number `index`, or all, in the next turn. Thread-safe."""
        sequences = self.job.sequences
        for sequence in sequences if index is None else [sequences[index]]:
            sequence.is_cancelled = True
        self._engine.wake()

    def finish(self, index: int) -> None:
        """Ends the sequence number `index` in the next turn, because its text is complete: its
        finish reason is `"stop"`. Thread-safe."""
        self.job.sequences[index].is_stopped = True
        self.cancel(index)

    def result(self, timeout: float | None = None) -> list[EngineOutput]:
        """Waits for the end, and returns the whole output of each sequence.

        Args:
            timeout: Maximum wait for each output, in seconds. `None` waits for ever.

        Raises:
            TimeoutError: If nothing came for `timeout` seconds.
        """
        parts: list[list[EngineOutput]] = [[] for _ in self.job.sequences]
        while not all(outputs and outputs[-1].finish_reason for outputs in parts):
            try:
                output = self._outputs.get(timeout=timeout)
            except queue.Empty:
                raise TimeoutError(f"The engine sent nothing for {timeout} seconds.") from None
            parts[output.index].append(output)
        return [merge(outputs) for outputs in parts]

    async def __aiter__(self) -> AsyncIterator[EngineOutput]:
        arrived = asyncio.Event()
        self._listener = asyncio.get_running_loop(), arrived
        unfinished = len(self.job.sequences)
        while unfinished:
            # Cleared before the queue is read, so that no output is missed.
            arrived.clear()
            while not self._outputs.empty():
                output = self._outputs.get()
                unfinished -= output.finish_reason is not None
                yield output
            if unfinished:
                await arrived.wait()

    def _send(self, output: EngineOutput) -> None:
        """Takes an output, on the thread of the engine."""
        if self._on_output is None:
            self._outputs.put(output)
            if self._listener is not None:
                self._engine.notify(*self._listener)
            return
        try:
            self._on_output(output)
        except Exception:
            logger.exception("`on_output` of a request failed. The request is cancelled.")
            self.cancel()


def merge(outputs: list[EngineOutput]) -> EngineOutput:
    """Returns the outputs of one sequence as one."""
    last = outputs[-1]
    arrays = {}
    for name in ("logprobs", "top_ids", "top_logprobs"):
        parts = [getattr(output, name) for output in outputs]
        parts = [part for part in parts if part is not None]
        arrays[name] = np.concatenate(parts) if parts else None
    ids = [id for output in outputs for id in output.ids]
    return EngineOutput(
        last.index, ids, **arrays, finish_reason=last.finish_reason, error=last.error
    )

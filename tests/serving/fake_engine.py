"""An engine without a model: scripted tokens, one per turn and sequence, on a thread."""

import asyncio
import collections
import concurrent.futures
import threading
import time
import types

import numpy as np

from keras_gemma.generation.engine_job import Timings
from keras_gemma.generation.engine_request import (
    EngineOutput,
    EngineStoppedError,
    QueueFullError,
)


class FakeHandle:
    def __init__(self, engine, request, on_output):
        self.engine, self.request, self.on_output = engine, request, on_output
        self.seed = request.seed if request.seed is not None else 1234
        self.num_cached_tokens = engine.cached_tokens
        self.timings = Timings(time.monotonic())
        self.left = {
            index: collections.deque(engine.script(request, index))
            for index in range(request.num_return_sequences)
        }
        self.num_new = collections.Counter()
        self.outputs = collections.deque()
        self.lock = threading.Lock()
        self.wake = lambda: None
        self.cancelled = set()

    def finish(self, index):
        with self.engine.turn:
            self.engine.finished.append((self.request, index))
            if index in self.left:
                self.engine.finish(self, index, "stop")
            self.engine.turn.notify_all()

    def cancel(self, index=None):
        with self.engine.turn:
            self.engine.cancels.append((self.request, index))
            for i in list(self.left) if index is None else [index]:
                if i in self.left:
                    self.engine.finish(self, i, "cancelled")
            self.engine.turn.notify_all()

    def emit(self, output):
        if self.on_output is not None:
            self.on_output(output)
            return
        with self.lock:
            self.outputs.append(output)
        self.wake()

    async def __aiter__(self):
        loop, ready = asyncio.get_running_loop(), asyncio.Event()

        def wake():
            if not loop.is_closed():
                loop.call_soon_threadsafe(ready.set)

        self.wake = wake
        ends = 0
        while ends < self.request.num_return_sequences:
            while self.outputs:
                output = self.outputs.popleft()
                ends += output.finish_reason is not None
                yield output
            if ends < self.request.num_return_sequences:
                await ready.wait()
                ready.clear()

    def result(self, timeout=None):
        deadline = time.monotonic() + (timeout or 60)
        while self.left:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        return list(self.outputs)


class FakeEngine:
    """Args: tokenizer, text that every sequence has, and limits. `hold` stops the turns."""

    max_batch_size = 2
    is_pinned = True
    is_full = False  # True refuses all requests

    def __init__(
        self, tokenizer, text="Hello there, world!", max_length=512, max_queued_requests=4
    ):
        self.tokenizer = tokenizer
        self.text, self.max_length, self.max_queued_requests = text, max_length, max_queued_requests
        self.turn = threading.Condition(threading.RLock())
        self.running, self.waiting = [], collections.deque()
        self.requests, self.cancels, self.finished = [], [], []
        self.is_held = False
        self.is_accepting, self.is_healthy = True, True
        self.failure = None
        self.cached_tokens = 0
        self.num_cancelled = 0
        self.delay = 0.0
        self.thread = None
        self.is_stopped = False
        self.texts_by_prompt = {}

    # The contract.

    def add_request(self, request, on_output=None):
        vocabulary = types.SimpleNamespace(vocabulary_size=self.tokenizer.vocabulary_size())
        request.check(vocabulary, self.max_length)
        with self.turn:
            if not self.is_accepting or not self.is_healthy:
                raise EngineStoppedError("The engine accepts no requests.")
            if self.is_full or len(self.waiting) >= self.max_queued_requests:
                error = QueueFullError(
                    f"The queue is full: {self.max_queued_requests} requests wait."
                )
                error.retry_after = 1.5
                raise error
            handle = FakeHandle(self, request, on_output)
            self.requests.append(request)
            self.waiting.append(handle)
            self.turn.notify_all()
        return handle

    def start(self):
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def drain(self, timeout):
        deadline = time.monotonic() + timeout
        with self.turn:
            self.is_accepting = False
            while (self.running or self.waiting) and time.monotonic() < deadline:
                self.turn.wait(0.01)
            self.end_all(EngineStoppedError("The server is shutting down."))

    def stop(self):
        with self.turn:
            self.is_stopped, self.is_accepting = True, False
            self.turn.notify_all()
        self.thread.join()

    def run_parts(self, parts):
        future = concurrent.futures.Future()
        try:
            future.set_result(list(parts))
        except Exception as error:
            future.set_exception(error)
        return future

    def stats(self):
        return types.SimpleNamespace(
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            num_waiting_tokens=sum(len(handle.request.prompt) for handle in self.waiting),
            slots_used=sum(len(handle.left) for handle in self.running),
            slots_total=self.max_batch_size,
            prefix_cache_queries=10,
            prefix_cache_hits=5,
            prefix_cache_bytes=100,
            prompt_tokens=sum(len(request.prompt) for request in self.requests),
            generation_tokens=7,
            num_steps=3,
            step_seconds=0.5,
            num_restarts=0,
            num_cancelled=self.num_cancelled,
        )

    # The script.

    def script(self, request, index):
        """Ids of a sequence, with a stop token at the end."""
        text = self.texts_by_prompt.get(tuple(request.prompt.tolist()), self.text)
        ids = self.tokenizer.encode([text], parse_special=True)[0]
        ids = ids[: request.max_new_tokens]
        if len(ids) < request.max_new_tokens and request.stop_token_ids:
            ids = [*ids, self.tokenizer.token_to_id("<end_of_turn>")]
        while len(ids) < request.max_new_tokens and not request.stop_token_ids:
            ids = [*ids, *ids][: request.max_new_tokens]
        return ids

    def run(self):
        while not self.is_stopped:
            with self.turn:
                if self.is_held or not (self.running or self.waiting):
                    self.turn.wait(0.05)
                    continue
                self.step()
                self.turn.notify_all()
            time.sleep(self.delay)

    def step(self):
        while self.waiting and len(self.running) < self.max_batch_size:
            handle = self.waiting.popleft()
            handle.timings.prefill_start = time.monotonic()
            self.running.append(handle)
        if self.failure is not None:
            error, self.failure = self.failure, None
            self.end_all(error, waiting=False)
            return
        for handle in list(self.running):
            handle.timings.first_token = handle.timings.first_token or time.monotonic()
            for index in list(handle.left):
                self.emit(handle, index)

    def emit(self, handle, index):
        request, ids = handle.request, handle.left[index]
        id = ids.popleft()
        handle.num_new[index] += 1
        is_stop = id in request.stop_token_ids
        is_last = is_stop or not ids
        reason = ("stop" if is_stop else "length") if is_last else None
        scores = {}
        if request.top_logprobs is not None:
            n = request.top_logprobs
            scores = {
                "logprobs": np.array([-0.5 - index], "float32"),
                "top_ids": np.array([[id, 5, 6, 7][:n]], "int32"),
                "top_logprobs": np.array([[-0.5 - index, -1.5, -2.5, -3.5][:n]], "float32"),
            }
        if is_last:
            self.finish(handle, index, None)
        handle.emit(EngineOutput(index, [id], finish_reason=reason, **scores))

    def finish(self, handle, index, reason, error=None):
        handle.left.pop(index, None)
        if reason is not None:
            self.num_cancelled += reason == "cancelled"
            handle.emit(EngineOutput(index, [], finish_reason=reason, error=error))
        if not handle.left:
            handle.timings.finish = time.monotonic()
            if handle in self.running:
                self.running.remove(handle)
            if handle in self.waiting:
                self.waiting.remove(handle)

    def end_all(self, error, waiting=True):
        for handle in [*self.running, *(self.waiting if waiting else ())]:
            for index in list(handle.left):
                self.finish(handle, index, "error", error)

    # Conveniences of tests.

    def hold(self):
        self.is_held = True

    def release(self):
        with self.turn:
            self.is_held = False
            self.turn.notify_all()

    def wait_until(self, condition, seconds=5.0):
        deadline = time.monotonic() + seconds
        while not condition(self):
            assert time.monotonic() < deadline, "the engine did not get there"
            time.sleep(0.002)

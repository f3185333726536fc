"""Sequences of one HTTP request: submitted, merged, counted and canceled together."""

import asyncio
import dataclasses
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from keras_gemma.causal_lm.text_engine import TextHandle, TextOutput, TextToken, TokenScore
from keras_gemma.generation.engine_request import (
    MAX_SEQUENCES,
    EngineRequest,
    EngineStoppedError,
    FinishReason,
)
from keras_gemma.serving.errors import ApiError, invalid, to_api_error
from keras_gemma.serving.request_log import RequestRecord
from keras_gemma.serving.service import Service
from keras_gemma.text.grammar import check_can_end


@dataclasses.dataclass
class Choice:
    """One complete sequence."""

    tokens: list[TextToken] = dataclasses.field(default_factory=list)
    tail: str = ""
    finish_reason: FinishReason | None = None
    stop: str | int | None = None

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens) + self.tail

    @property
    def mean_logprob(self) -> float:
        """Mean log-probability of the tokens, by which `best_of` chooses."""
        logprobs = [token.score.logprob for token in self.tokens if token.score is not None]
        return sum(logprobs) / len(logprobs) if logprobs else 0.0

    def add(self, output: TextOutput) -> None:
        self.tokens += output.tokens
        self.tail = output.tail
        self.finish_reason, self.stop = output.finish_reason, output.stop


class Generation:
    """Sequences of one HTTP request.

    Args:
        service: The service.
        record: Record of the HTTP request, which is filled in.
        handles: One handle per prompt.
    """

    def __init__(self, service: Service, record: RequestRecord, handles: list[TextHandle]) -> None:
        self.service = service
        self.record = record
        self.handles = handles
        self.is_closed = False

    @property
    def seed(self) -> int:
        """Seed of the first prompt."""
        return int(self.handles[0].handle.seed)

    @property
    def cached_tokens(self) -> int:
        """Number of prompt tokens that were found in the prefix cache."""
        return sum(text_handle.handle.num_cached_tokens or 0 for text_handle in self.handles)

    async def outputs(self) -> AsyncIterator[TextOutput]:
        """Yields the outputs of all sequences. The index is that of the choice.

        Raises:
            ApiError: If the engine fails.
        """
        metrics, last = self.service.metrics, {}
        counts: Counter[int] = Counter()
        async for offset, output in self._merged():
            output.index += offset
            if output.finish_reason in ("error", "cancelled"):
                raise to_api_error(output.error or EngineStoppedError("The request was canceled."))
            now, tokens = time.monotonic(), len(output.tokens)
            self.record.completion_tokens += tokens
            counts[output.index] += tokens
            if output.index in last and tokens:
                gap = (now - last[output.index]) / tokens
                for _ in range(tokens):
                    metrics.inter_token.observe(gap)
            last[output.index] = now
            if output.finish_reason is not None:
                self.record.finish_reasons.append(output.finish_reason)
            yield output
        self._observe(counts)

    async def _merged(self) -> AsyncIterator[tuple[int, TextOutput]]:
        """Yields outputs with the index of their handle's first choice."""
        starts, start = [], 0
        for handle in self.handles:
            starts.append(start)
            start += len(handle.sequences)
        if len(self.handles) == 1:
            async for output in self.handles[0]:
                yield 0, output
            return
        queue: asyncio.Queue[tuple[int, TextOutput | Exception | None]] = asyncio.Queue()

        async def pump(start: int, handle: TextHandle) -> None:
            try:
                async for output in handle:
                    queue.put_nowait((start, output))
                queue.put_nowait((start, None))
            except Exception as error:
                queue.put_nowait((start, error))

        pairs = zip(starts, self.handles, strict=True)
        tasks = [asyncio.ensure_future(pump(*pair)) for pair in pairs]
        try:
            running = len(tasks)
            while running:
                start, item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    running -= 1
                else:
                    yield start, item
        finally:
            for task in tasks:
                task.cancel()

    async def collect(self) -> list[Choice]:
        """Returns all sequences, in the order of their index."""
        choices = [Choice() for handle in self.handles for _ in handle.sequences]
        try:
            async for output in self.outputs():
                choices[output.index].add(output)
        finally:
            self.close()
        return choices

    def close(self) -> None:
        """Cancels what has not ended."""
        if self.is_closed:
            return
        self.is_closed = True
        for handle in self.handles:
            if not handle.is_finished:
                handle.cancel()

    def _observe(self, counts: Mapping[int, int]) -> None:
        """Adds times and counts to the record and the metrics, at the normal end.

        `counts` has the number of tokens of each choice.
        """
        record, metrics = self.record, self.service.metrics
        record.cached_tokens = self.cached_tokens
        metrics.prompt_length.observe(record.prompt_tokens)
        metrics.generation_length.observe(record.completion_tokens)
        now = time.monotonic()
        metrics.latency.observe(now - record.start)
        start = 0
        for text_handle in self.handles:
            choices = range(start, start + len(text_handle.sequences))
            start = choices.stop
            timings = text_handle.handle.timings
            prefill, first = timings.prefill_start, timings.first_token
            if prefill is None or first is None:
                continue
            end = timings.finish or now
            queue_seconds = prefill - timings.arrival
            metrics.queue.observe(queue_seconds)
            metrics.prefill.observe(first - prefill)
            metrics.decode.observe(end - first)
            metrics.inference.observe(end - prefill)
            metrics.first_token.observe(first - timings.arrival)
            longest = max(counts[choice] for choice in choices)
            metrics.per_token.observe((end - first) / max(1, longest - 1))
            record.queue_seconds = max(record.queue_seconds or 0.0, queue_seconds)
            record.prefill_seconds = (record.prefill_seconds or 0.0) + first - prefill
            record.decode_seconds = max(record.decode_seconds or 0.0, end - first)


def submit(
    service: Service,
    record: RequestRecord,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int | None,
    stops: Sequence[str],
    settings: Mapping[str, Any],
    copies: int = 1,
) -> Generation:
    """Adds prompts to the engine, all or none.

    Args:
        service: The service.
        record: Record of the HTTP request.
        prompts: Ids of the prompts.
        max_new_tokens: Maximum number of new tokens. `None` allows the rest of the context.
        stops: Stop strings.
        settings: Further arguments of `EngineRequest`.
        copies: Number of sequences per prompt.

    Raises:
        ApiError: If the request is invalid, or refused.
    """
    service.check_ready()
    limits, context = service.settings, service.texts.max_length
    if copies > MAX_SEQUENCES or copies * len(prompts) > limits.max_choices:
        raise ApiError(
            400,
            f"A request may have at most {limits.max_choices} sequences, and {MAX_SEQUENCES} per "
            f"prompt. Received: {len(prompts)} prompts with {copies} sequences each.",
            "too_many_choices",
            "n",
        )
    queue = service.texts.engine.max_queued_requests
    if len(prompts) > queue:
        raise ApiError(
            400,
            f"At most {queue} prompts may wait at a time. Received: {len(prompts)} prompts. Send "
            "them in several requests.",
            "too_many_choices",
            "prompt",
        )
    lengths = [
        max(1, context - len(ids)) if max_new_tokens is None else max_new_tokens for ids in prompts
    ]
    if copies * sum(lengths) > limits.max_request_tokens:
        raise ApiError(
            400,
            f"A request may ask for at most {limits.max_request_tokens} new tokens in all. "
            f"Received: {copies * sum(lengths)}. Lower `max_tokens` or `n`.",
            "too_many_tokens",
            "max_tokens",
        )
    record.prompt_tokens += sum(map(len, prompts))
    service.metrics.choices.observe(copies)
    service.metrics.max_tokens.observe(max(lengths))
    settings = {"stop_token_ids": service.texts.stop_token_ids, **settings}
    if settings.get("constraint") is not None:
        try:
            ends = service.texts.stop_token_ids
            check_can_end(ends, settings["stop_token_ids"], "Leave `ignore_eos` out")
        except ValueError as error:
            raise ApiError(400, str(error), "invalid_value", "ignore_eos") from error
    if "cache_salt" not in settings:
        settings["cache_salt"] = record.key_salt
    handles: list[TextHandle] = []
    try:
        for ids, length in zip(prompts, lengths, strict=True):
            request = EngineRequest(
                prompt=ids, max_new_tokens=length, num_return_sequences=copies, **settings
            )
            handles.append(service.texts.submit(request, stops))
    except Exception as error:
        for handle in handles:
            handle.cancel()
        raise invalid(error) from error
    return Generation(service, record, handles)


async def score_prompt(service: Service, ids: np.ndarray, count: int) -> list[TokenScore | None]:
    """Returns one score for each token of a prompt, `None` for the first.

    Args:
        service: The service.
        ids: Ids of the prompt.
        count: Number of top log-probabilities.

    Raises:
        ApiError: If the engine does not score prompts, or fails.
    """
    try:
        return [None, *await service.texts.score_prompt(ids, count)]
    except Exception as error:
        raise invalid(error) from error


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """Returns the usage of a request in OpenAI's format."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def best(choices: Iterable[Choice], count: int) -> list[Choice]:
    """Returns the choices with the highest log-probability per token."""
    return sorted(choices, key=lambda choice: -choice.mean_logprob)[:count]

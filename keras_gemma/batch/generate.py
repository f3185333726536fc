"""Prompts to texts at full occupancy."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import numpy as np

from keras_gemma.causal_lm.engine_requests import engine_request
from keras_gemma.causal_lm.settings import GenerationSettings, read_settings
from keras_gemma.causal_lm.text_engine import TextEngine, TextOutput
from keras_gemma.generation.engine import DEFAULT_BATCH_SIZE
from keras_gemma.generation.engine_request import EngineRequest, QueueFullError

QUEUED_PER_SLOT = 2
"""Prompts per slot that are read ahead from the iterable."""


@dataclasses.dataclass(frozen=True)
class BatchOutput:
    """Sequences that continue one prompt."""

    index: int
    """Number of the prompt."""
    texts: list[str]
    """New text of each sequence."""
    finish_reasons: list[Literal["stop", "length"]]
    prompt_tokens: int
    new_tokens: list[int]
    """Number of new tokens of each sequence."""


@dataclasses.dataclass
class _Pending:
    """A prompt in the engine."""

    prompt: np.ndarray
    texts: list[str]
    finish_reasons: list[str | None]
    new_tokens: list[int]
    error: Exception | None = None

    def add(self, output: TextOutput) -> None:
        self.texts[output.index] += output.text
        self.new_tokens[output.index] += len(output.tokens)
        self.finish_reasons[output.index] = output.finish_reason
        self.error = output.error or self.error

    @property
    def is_finished(self) -> bool:
        return None not in self.finish_reasons


def generate_batch(
    lm: Any,
    prompts: Iterable[Any],
    *,
    max_batch_size: int = DEFAULT_BATCH_SIZE,
    max_length: int | None = None,
    pinned: bool = False,
    **settings: Any,
) -> Iterator[BatchOutput]:
    """Generates text for many prompts, and yields each as soon as it is finished.

    The texts are those of `lm.generate` with one prompt at a time, up to rounding in bfloat16. A
    sequence that ends makes space for the next prompt at once, so that the rows of a decode step
    are always in use, whatever the lengths.

    Args:
        lm: A `GemmaCausalLM` with a preprocessor.
        prompts: Strings, lists of token ids, or conversations: lists of messages
            `{"role", "content"}`. A dict `{"prompt": ..., **settings}` or
            `{"messages": ..., **settings}` has settings of its own. Read as slots become free.
        max_batch_size, max_length, pinned: Same as in `Engine`.
        **settings: `GenerationSettings`, as in `lm.generate`, except `logits_processors`,
            `return_logprobs`, and samplers that are not greedy or random.

    Yields:
        A `BatchOutput` for each prompt, in the order in which they finish.

    Raises:
        ValueError, TypeError: If a setting or a prompt is invalid. The message names the prompt.

    Example:

    ```python
    import keras_gemma
    from keras_gemma.batch import generate_batch

    lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
    for output in generate_batch(lm, ["ROMEO:", "JULIET:", "NURSE:"], max_new_tokens=8):
        print(output.index, output.texts[0])
    ```
    """
    shared = read_settings(settings, "generate_batch").with_defaults(lm.generation_settings)
    engine = lm.engine(
        max_batch_size,
        max_length=max_length,
        max_queued_requests=QUEUED_PER_SLOT * max_batch_size + 1,
        pinned=pinned,
    )
    return _outputs(lm, TextEngine(engine, lm.preprocessor), enumerate(prompts), shared)


def _outputs(
    lm: Any, texts: TextEngine, prompts: Iterator[tuple[int, Any]], shared: GenerationSettings
) -> Iterator[BatchOutput]:
    engine = texts.engine
    requests = _requests(lm, prompts, shared, engine.max_length)
    pending: dict[int, _Pending] = {}
    following = next(requests, None)
    while following is not None or pending:
        while following is not None:
            index, request, stops = following
            count = request.num_return_sequences
            entry = _Pending(request.prompt, [""] * count, [None] * count, [0] * count)
            try:
                texts.submit(request, stops, entry.add)
            except QueueFullError:  # An empty queue takes any request.
                break
            pending[index] = entry
            following = next(requests, None)
            if (
                len(pending) >= (1 + QUEUED_PER_SLOT) * engine.max_batch_size
                or engine.stats().num_waiting >= QUEUED_PER_SLOT * engine.max_batch_size
            ):
                break
        engine.step()
        for index in [index for index, entry in pending.items() if entry.is_finished]:
            entry = pending.pop(index)
            if entry.error is not None:
                raise entry.error
            yield BatchOutput(
                index, entry.texts, entry.finish_reasons, len(entry.prompt), entry.new_tokens
            )


def _requests(
    lm: Any, prompts: Iterable[tuple[int, Any]], shared: GenerationSettings, max_length: int
) -> Iterator[tuple[int, EngineRequest, tuple[str, ...]]]:
    """Yields number, request and stop strings of each prompt."""
    for index, prompt in prompts:
        try:
            yield index, *read_prompt(lm, prompt, shared, max_length)
        except (ValueError, TypeError) as error:
            raise type(error)(f"Prompt {index}: {error}") from error


def read_prompt(
    lm: Any, prompt: Any, shared: GenerationSettings, max_length: int
) -> tuple[EngineRequest, tuple[str, ...]]:
    """Returns the request of a prompt in any of the formats, and its stop strings.

    `max_length` is the maximum number of tokens per sequence, including the prompt.
    """
    settings = shared
    if isinstance(prompt, Mapping):
        own = dict(prompt)
        names = [name for name in ("prompt", "messages") if name in own]
        if len(names) != 1:
            raise ValueError(
                'A prompt that is a dict must have either "prompt" or "messages". '
                f"Received: {sorted(own)}"
            )
        prompt = own.pop(names[0])
        settings = read_settings(own, "generate_batch").with_defaults(shared)
    request = engine_request(lm, prompt, settings)
    request.check(lm.backbone.config, max_length)
    return request, settings.stops

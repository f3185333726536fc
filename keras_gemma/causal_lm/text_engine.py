"""Texts on the engine: prompts to requests, and the outputs of the engine to text as it grows.

A server iterates over a `TextHandle`. A program without an event loop passes `on_output`, which the
thread of the engine calls. Knows nothing about HTTP.
"""

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from keras_gemma.generation.engine import Engine
from keras_gemma.generation.engine_request import (
    EngineOutput,
    EngineRequest,
    FinishReason,
    TokenConstraint,
)
from keras_gemma.generation.request_handle import RequestHandle
from keras_gemma.scoring.prompt_scores import PromptScorer, PromptScores
from keras_gemma.text.inputs import to_ids
from keras_gemma.text.preprocessor import GemmaCausalLMPreprocessor, require_preprocessor
from keras_gemma.text.stream import TextStream
from keras_gemma.text.tokenizer import GemmaTokenizer

CompileFormat = Callable[[dict[str, Any]], Callable[[], TokenConstraint] | None]
"""Function that compiles a response format, `None` for any text."""


class TokenScore(NamedTuple):
    """Log-probability of a token, and the most likely tokens at its position."""

    logprob: float
    top: list[tuple[int, float]]
    """Id and log-probability of the most likely tokens, in descending order."""


@dataclasses.dataclass
class TextToken:
    """Token of a sequence."""

    id: int
    text: str
    """Text that is decided by this token. Empty if the token is part of a character."""
    score: TokenScore | None
    """`None` if the request has no log-probabilities, and for the first token of a prompt."""


@dataclasses.dataclass
class TextOutput:
    """New text of one sequence."""

    index: int
    """Number of the sequence."""
    tokens: list[TextToken]
    """New tokens, up to the one that completes a stop string. A stop token is included."""
    finish_reason: FinishReason | None
    """`None` until the last output of the sequence."""
    tail: str = ""
    """Text after that of the tokens: withheld until the end, as a possible stop string."""
    stop: str | int | None = None
    """Stop string or stop token that ended the sequence."""
    error: Exception | None = None
    """The exception that ended the sequence, if `finish_reason` is `"error"`."""

    @property
    def text(self) -> str:
        """The new text."""
        return "".join(token.text for token in self.tokens) + self.tail


class SequenceText:
    """Text of one sequence, from the outputs of the engine.

    Args:
        decode: Function that returns the text of ids.
        stops: Stop strings.
        stop_token_ids: Stop tokens, whose text is left out.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        stops: Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
    ) -> None:
        self.stream = TextStream(decode, stops)
        self.stop_token_ids = frozenset(stop_token_ids)
        self.is_finished = False

    def push(self, output: EngineOutput) -> TextOutput:
        """Returns the text of an output. After a stop string, nothing may be pushed."""
        tokens: list[TextToken] = []
        reason, stop, tail = output.finish_reason, None, ""
        for i, id in enumerate(output.ids):
            is_last = reason == "stop" and i == len(output.ids) - 1
            if is_last and id in self.stop_token_ids:
                stop = id
                tokens.append(TextToken(id, "", _score(output, i)))
                break
            tokens.append(TextToken(id, self.stream.push([id]), _score(output, i)))
            if self.stream.stopped:
                break
        if reason is not None and not self.stream.stopped:
            tail = self.stream.finish()
        if self.stream.stopped:
            reason = "stop"
            stop = next(stop for stop in self.stream.stops if self.stream.rest.startswith(stop))
        self.is_finished = reason is not None
        return TextOutput(output.index, tokens, reason, tail, stop, output.error)


def _score(output: EngineOutput, i: int) -> TokenScore | None:
    if output.logprobs is None:
        return None
    row = slice(i, i + 1)
    tops = output.top_ids, output.top_logprobs
    top_ids, top = (np.zeros((1, 0)) if array is None else array[row] for array in tops)
    ((logprob, pairs),) = rows_of(output.logprobs[row], top_ids, top)
    return TokenScore(logprob, pairs)


def rows_of(
    logprobs: np.ndarray, top_ids: np.ndarray, top: np.ndarray
) -> Iterator[tuple[float, list[tuple[int, float]]]]:
    """Yields the log-probability of each token, and id and log-probability of the top tokens."""
    rows = zip(logprobs.tolist(), top_ids.tolist(), top.tolist(), strict=True)
    for logprob, ids, values in rows:
        yield logprob, list(zip(ids, values, strict=True))


class TextHandle:
    """Request on the engine, whose outputs are texts."""

    def __init__(self, handle: RequestHandle, sequences: list[SequenceText]) -> None:
        self.handle = handle
        self.sequences = sequences

    @property
    def is_finished(self) -> bool:
        """True if all sequences have ended."""
        return all(sequence.is_finished for sequence in self.sequences)

    def cancel(self) -> None:
        """Ends the request and frees its slots, at any stage."""
        self.handle.cancel()

    def push(self, output: EngineOutput) -> TextOutput | None:
        """Returns the text of an output, or `None` after the end of its sequence."""
        sequence = self.sequences[output.index]
        if sequence.is_finished:
            return None
        text = sequence.push(output)
        if text.finish_reason is not None and output.finish_reason is None:  # a stop string
            self.handle.finish(output.index)
        return text

    async def __aiter__(self) -> AsyncIterator[TextOutput]:
        """Yields outputs until all sequences have ended."""
        async for output in self.handle:
            text = self.push(output)
            if text is not None:
                yield text
            if self.is_finished:
                return


class TextEngine:
    """An engine and the tokenizer of its model.

    Args:
        engine: An `Engine`.
        preprocessor: Preprocessor of the model.
        score_prompt: Same as `PromptScorer.score_prompt`. The thread of the engine makes its steps.
            `None` refuses log-probabilities of prompts.
        compile_format: Same as `GrammarCompiler.compile`. `None` refuses response formats.
    """

    def __init__(
        self,
        engine: Engine,
        preprocessor: GemmaCausalLMPreprocessor,
        score_prompt: Callable[[np.ndarray, int], Iterator[PromptScores]] | None = None,
        compile_format: CompileFormat | None = None,
    ) -> None:
        self.engine = engine
        self.preprocessor = preprocessor
        self.tokenizer: GemmaTokenizer = preprocessor.tokenizer
        self.stop_token_ids = tuple(self.tokenizer.stop_token_ids)
        self._score_prompt = score_prompt
        self._compile_format = compile_format

    @property
    def max_length(self) -> int:
        """Maximum number of tokens of a sequence, including the prompt."""
        return self.engine.max_length

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Returns the ids of prompts, as `generate` encodes them."""
        return self.preprocessor.tokenize_prompts(texts)

    def check_ids(self, name: str, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Returns ids as int32 `[T]`, or raises a ValueError that names the argument."""
        return to_ids(name, ids, 1, self.tokenizer.vocabulary_size())

    def decode(self, ids: list[int]) -> str:
        """Returns the text of ids, without `<bos>`, `<eos>` and `<pad>`."""
        return self.tokenizer.pieces.decode(ids)

    def submit(
        self,
        request: EngineRequest,
        stops: Sequence[str] = (),
        on_output: Callable[[TextOutput], None] | None = None,
    ) -> TextHandle:
        """Adds a request to the engine.

        Args:
            request: The request.
            stops: Stop strings. They are not part of the text.
            on_output: Function that the thread of the engine calls with each output. `None` if the
                handle is iterated.

        Raises:
            ValueError: If the model cannot answer the request.
            QueueFullError, EngineStoppedError: Same as in `Engine.add_request`.
        """
        self.check_ids("stop_token_ids", request.stop_token_ids)
        sequences = [
            SequenceText(self.decode, stops, request.stop_token_ids)
            for _ in range(request.num_return_sequences)
        ]
        if on_output is None:
            return TextHandle(self.engine.add_request(request), sequences)
        text_handle = TextHandle(None, sequences)  # type: ignore[arg-type]
        is_known = threading.Event()

        def push(output: EngineOutput) -> None:
            is_known.wait()
            text = text_handle.push(output)
            if text is not None:
                on_output(text)

        try:
            text_handle.handle = self.engine.add_request(request, push)
        finally:
            is_known.set()
        return text_handle

    def constraint(self, response_format: dict[str, Any]) -> Callable[[], TokenConstraint] | None:
        """Returns the constraint of a response format as in OpenAI's API, `None` for any text.

        The first call reads the whole vocabulary, which takes seconds.

        Raises:
            ValueError: If the format is invalid, or the engine takes none.
            ImportError: If llguidance is not installed.
        """
        if response_format.get("type") == "text":
            return None
        if self._compile_format is None:
            raise ValueError("`response_format` is not supported by this engine. Leave it out.")
        return self._compile_format(response_format)

    async def score_prompt(self, prompt: np.ndarray, top_logprobs: int) -> list[TokenScore]:
        """Returns one score for each token of a prompt but the first.

        Raises:
            ValueError: If the engine cannot score prompts.
        """
        if self._score_prompt is None:
            raise ValueError("This engine does not return log-probabilities of prompts.")
        if len(prompt) < 2:
            return []
        # Between two parts, the engine makes the steps of other requests.
        future = self.engine.run_parts(self._score_prompt(prompt, top_logprobs))
        parts = await asyncio.wrap_future(future)
        return [TokenScore(*row) for part in parts for row in rows_of(*part)]


def create_text_engine(lm: Any, **options: Any) -> TextEngine:
    """Returns an engine of texts.

    Args:
        lm: A `GemmaCausalLM`.
        **options: Same as in `GemmaCausalLM.engine`.

    Raises:
        ValueError: If the model has no preprocessor, or an option is invalid.
    """
    require_preprocessor(lm.preprocessor)
    scorer = PromptScorer(lm.backbone)
    lock = threading.Lock()

    def compile_format(response_format: dict[str, Any]) -> Callable[[], TokenConstraint] | None:
        with lock:  # The compiler is built only once.
            compiler = lm.grammar_compiler
        return compiler.compile(response_format)

    return TextEngine(lm.engine(**options), lm.preprocessor, scorer.score_prompt, compile_format)

"""Text generation for one batch: tokenizes, generates and detokenizes."""

import dataclasses
from collections.abc import Callable, Generator, Iterator
from typing import Any, Literal

import numpy as np

from keras_gemma.causal_lm.completion import Completion
from keras_gemma.causal_lm.prompts import (
    Prompts,
    max_new_tokens_in_padding,
    read_prompts,
)
from keras_gemma.causal_lm.settings import GenerationSettings
from keras_gemma.generation.engine_request import TokenConstraint
from keras_gemma.generation.generate import check, generate, start
from keras_gemma.generation.request import Draft, PrefixCache, Request, SequenceOutput
from keras_gemma.generation.samplers.sampler import Sampler, check_rows
from keras_gemma.generation.session import DecodingSession
from keras_gemma.generation.stopping import ends_with_stop_token
from keras_gemma.text.grammar import check_can_end
from keras_gemma.text.inputs import to_ids
from keras_gemma.text.preprocessor import require_preprocessor
from keras_gemma.text.stream import TextStream
from keras_gemma.text.tokenizer import GemmaTokenizer

TOKENS_PER_STOP_CHECK = 4
"""Number of generated tokens between two searches for stop strings."""


class TextRequest:
    """Request to continue a batch of prompts.

    Args:
        lm: A `GemmaCausalLM`.
        inputs: Prompts to continue, in any format.
        settings: Settings of the call, filled up with those of `compile`.
        prefix: Prefix cache.
        draft: Draft settings for speculative decoding.

    Raises:
        ValueError: If the settings do not fit the prompts.
    """

    def __init__(
        self,
        lm: Any,
        inputs: Any,
        settings: GenerationSettings,
        prefix: PrefixCache | None = None,
        draft: Draft | None = None,
    ) -> None:
        self.programs, self.settings = lm.programs, settings
        preprocessor = self.preprocessor = lm.preprocessor
        prompts = inputs
        if not isinstance(inputs, Prompts):
            prompts = read_prompts(inputs, preprocessor, lm.backbone.config.vocabulary_size)
        self.prompts = prompts
        settings.check_rows(len(prompts.ids))
        if settings.stops:
            require_preprocessor(preprocessor, "`stop`", "Leave it out")
        sampler = settings.choose_sampler(lm.sampler, settings.sampler)
        sampler.check_rows(len(prompts.ids))
        if settings.seed is None:
            check_rows("seed", sampler.seed, len(prompts.ids))
        num_return_sequences = settings.num_return_sequences or sampler.num_return_sequences
        if prompts.width is not None and (
            num_return_sequences > 1 or settings.stops or settings.top_logprobs is not None
        ):
            raise ValueError(
                "Padded arrays do not support `num_return_sequences`, `return_all_beams`, "
                "`return_logprobs` or `stop`, because the output has the shape of the input. Pass "
                "strings, or ids as a list of lists."
            )
        if num_return_sequences > 1 and sampler.is_greedy:
            raise ValueError(
                "`num_return_sequences` above 1 would repeat the same text with a greedy sampler. "
                "Pass a `temperature`, or `sampler='beam'`. "
                f"Received: num_return_sequences={num_return_sequences}"
            )
        if prefix is not None:
            if not isinstance(prefix, PrefixCache):
                raise TypeError(
                    "`prefix` must be a prefix cache returned by `prefill`. "
                    f"Received: prefix={prefix!r:.80} of type {type(prefix).__name__}"
                )
            prefix.check(lm.backbone)
        if draft is not None and draft.tokenizer is not None and preprocessor is not None:
            check_same_pieces(preprocessor.tokenizer, draft.tokenizer)
        stop_token_ids = self._stop_token_ids(settings.stop_token_ids)
        self.session: DecodingSession | None = None
        """Session of a stream. `None` before the first piece."""
        self.streams: list[TextStream] = []
        self.token_request = Request(
            prompts=prompts.ids,
            max_new_tokens=self._max_new_tokens(),
            sampler=sampler,
            stop_token_ids=stop_token_ids,
            seed=settings.seed,
            num_return_sequences=num_return_sequences,
            repetition_penalty=settings.repetition_penalty,
            frequency_penalty=settings.frequency_penalty,
            presence_penalty=settings.presence_penalty,
            logits_processors=settings.processors,
            top_logprobs=settings.top_logprobs,
            prefix=prefix,
            draft=draft,
            constraint=read_constraint(lm, settings, sampler, stop_token_ids, draft),
        )

    def complete(
        self,
        strip_prompt: bool,
        decode: Callable[[Request], list[SequenceOutput]] | None = None,
    ) -> Any:
        """Generates all texts and returns them in the structure of the prompts.

        Args:
            strip_prompt: If True, returns only the new text.
            decode: Function that generates in place of the programs of the model.
        """
        streams: list[TextStream | None]
        if decode is not None:
            if self.settings.stops:
                raise ValueError(
                    "A model that overrides `generate_step` or `call_with_cache` does not support "
                    f"`stop`. Received: stop={self.settings.stops!r}"
                )
            rows = decode(self.token_request)
            streams = [None] * len(rows)
        elif self.settings.stops:
            session = start(self.programs, self.token_request)
            streams, rows = self._streams(), []
            for _ in self._grow(session, streams, TOKENS_PER_STOP_CHECK):
                pass
            for stream, row in zip(streams, session.outputs(), strict=True):
                stream.finish()
                rows.append(_cut(row, stream) if stream.stopped else row)
        else:
            rows = generate(self.programs, self.token_request)
            streams = [None] * len(rows)
        num_return_sequences = len(rows) // len(self.prompts.ids)
        prompts = [ids[:0] if strip_prompt else ids for ids in self.prompts.ids]
        prompts = [ids for ids in prompts for _ in range(num_return_sequences)]
        if self.prompts.width is not None:
            pairs = zip(prompts, rows, strict=True)
            return self.prompts.pad([np.concatenate([prompt, row.ids]) for prompt, row in pairs])
        outputs = [self._finish(*parts) for parts in zip(prompts, rows, streams, strict=True)]
        return self.prompts.answer(outputs, num_return_sequences)

    def stream(self) -> Generator[Any, None, list[str]]:
        """Yields the new text of a single prompt, or a list with the new text of each row.

        Returns a list with the finish reason of each row.
        """
        require_preprocessor(self.preprocessor, "`stream`", "Use `generate` with token ids")
        check(self.programs, self.token_request)
        return self._pieces()

    def new_ids(self) -> list[int]:
        """Returns the new ids of a single-prompt stream, without the stop token."""
        ids = self.session.new_ids()[0].tolist()
        return ids[:-1] if ends_with_stop_token(ids, self.token_request.stop_token_ids) else ids

    def is_stopped(self) -> bool:
        """Returns True if a single-prompt stream has reached a stop token or stop string."""
        return finish_reason(self.session.outputs()[0], self.streams[0]) == "stop"

    def _pieces(self) -> Generator[Any, None, list[str]]:
        session = self.session = start(self.programs, self.token_request)
        streams = self.streams = self._streams()
        single = self.prompts.single and len(streams) == 1
        for texts in self._grow(session, streams, 1):
            if any(texts):
                yield texts[0] if single else texts
        texts = [stream.finish() for stream in streams]
        if any(texts):
            yield texts[0] if single else texts
        rows = zip(session.outputs(), streams, strict=True)
        return [finish_reason(row, stream) for row, stream in rows]

    def _streams(self) -> list[TextStream]:
        rows = len(self.prompts.ids) * self.token_request.num_return_sequences
        return [TextStream(self.text_of, self.settings.stops) for _ in range(rows)]

    def _grow(
        self, session: DecodingSession, streams: list[TextStream], tokens: int
    ) -> Iterator[list[str]]:
        """Yields the new text of each row, once per `tokens` tokens."""
        growing = True
        while True:
            yield [
                "".join(stream.push([id]) for id in ids[stream.pushed :])
                for stream, ids in zip(streams, session.new_ids(), strict=True)
            ]
            if not growing:
                return
            stopped = np.array([stream.stopped for stream in streams])
            if stopped.any():
                session.stop(stopped)
            growing = session.decode(tokens)

    def _finish(self, prompt: np.ndarray, row: SequenceOutput, stream: TextStream | None) -> Any:
        ids = np.concatenate([prompt, row.ids]).astype("int32")
        text = None
        if self.prompts.texts:
            text = self.text_of(ids)
            if stream is not None and stream.stopped:
                text = text.removesuffix(stream.rest)
        if self.token_request.top_logprobs is None:
            return ids.tolist() if text is None else text
        tops = None
        if self.token_request.top_logprobs:
            pairs = zip(row.top_ids, row.top_logprobs, strict=True)
            tops = [dict(zip(a.tolist(), b.tolist(), strict=True)) for a, b in pairs]
        return Completion(
            text=text,
            token_ids=row.ids.tolist(),
            finish_reason=finish_reason(row, stream),
            logprobs=row.logprobs,
            top_logprobs=tops,
            acceptance_rate=row.acceptance_rate,
            score=row.score,
        )

    def text_of(self, ids: Any) -> str:
        """Returns the text of ids, without a final stop token."""
        ids = np.asarray(ids, "int32")
        if ends_with_stop_token(ids, self.token_request.stop_token_ids):
            ids = ids[:-1]
        mask = np.ones_like(ids, "bool")
        return self.preprocessor.generate_postprocess({"token_ids": ids, "padding_mask": mask})

    def _max_new_tokens(self) -> list[int]:
        settings, lengths = self.settings, [len(ids) for ids in self.prompts.ids]
        if self.prompts.width is not None:
            max_new_tokens = None
            if settings.max_new_tokens is not None:
                max_new_tokens = settings.max_new_tokens_of(lengths, None)
            return max_new_tokens_in_padding(self.prompts, settings.max_length, max_new_tokens)
        default = None
        if settings.max_length is None and settings.max_new_tokens is None:
            require_preprocessor(
                self.preprocessor,
                "the default `max_length`",
                "Pass `max_length` or `max_new_tokens`",
            )
            context = self.programs.config.context_length
            default = min(self.preprocessor.sequence_length, context)
        return settings.max_new_tokens_of(lengths, default)

    def _stop_token_ids(self, stop_token_ids: Any) -> tuple[int, ...]:
        if isinstance(stop_token_ids, str):
            if stop_token_ids != "auto":
                raise ValueError(
                    "`stop_token_ids` must be 'auto', None, or token ids. "
                    f"Received: stop_token_ids={stop_token_ids!r}"
                )
            require_preprocessor(
                self.preprocessor,
                "stop_token_ids='auto'",
                "Pass `stop_token_ids` (`None` disables stop tokens)",
            )
            return tuple(self.preprocessor.tokenizer.stop_token_ids)
        size = self.programs.config.vocabulary_size
        ids = [stop_token_ids] if np.ndim(stop_token_ids) == 0 else list(stop_token_ids)
        return tuple(to_ids("stop_token_ids", ids, 1, size).tolist())


def finish_reason(row: SequenceOutput, stream: TextStream | None) -> Literal["stop", "length"]:
    """Returns `"stop"` if a stop token or stop string ended the text, otherwise `"length"`."""
    return "stop" if row.stopped or (stream is not None and stream.stopped) else "length"


def read_constraint(
    lm: Any,
    settings: GenerationSettings,
    sampler: Sampler,
    stop_token_ids: tuple[int, ...],
    draft: Draft | None,
) -> Callable[[], TokenConstraint] | None:
    """Returns the function that returns a constraint of the response format, if there is one.

    Raises:
        ValueError: If the response format is invalid, or excludes another argument.
    """
    response_format = settings.response_format
    if response_format is None or response_format["type"] == "text":
        return None
    require_preprocessor(lm.preprocessor, "`response_format`", "Leave it out")
    problem = None
    if draft is not None:
        problem = "`response_format` does not support a `draft`. Leave one of them out"
    elif sampler.strategy != "sample":
        problem = "`response_format` needs a sampler that decodes token by token, such as 'greedy'"
    elif lm.overrides_steps:
        problem = (
            "A model that overrides `generate_step`, `call_with_cache` or `build_cache` does not "
            "support `response_format`"
        )
    if problem is not None:
        raise ValueError(f"{problem}. Received: response_format={response_format!r:.80}")
    check_can_end(lm.preprocessor.tokenizer.stop_token_ids, stop_token_ids)
    return lm.grammar_compiler.compile(response_format)


def check_same_pieces(tokenizer: GemmaTokenizer, other: GemmaTokenizer) -> None:
    """Raises a ValueError if `other`, the tokenizer of a draft, has another vocabulary."""
    if other is tokenizer or other.proto == tokenizer.proto:
        return
    if other.get_vocabulary() != tokenizer.get_vocabulary():
        raise ValueError(
            "`draft` must have the same vocabulary as the model. Pass a model of the same family, "
            f"or draft='prompt'. Received: a draft with {other.vocabulary_size()} pieces, some "
            f"different, and a model with {tokenizer.vocabulary_size()}"
        )


def _cut(row: SequenceOutput, stream: TextStream) -> SequenceOutput:
    """Truncates `row` after the token that completed the stop string."""
    names = ("ids", "logprobs", "top_ids", "top_logprobs")
    arrays = {name: getattr(row, name) for name in names if getattr(row, name) is not None}
    cut = {name: array[: stream.pushed] for name, array in arrays.items()}
    return dataclasses.replace(row, stopped=True, **cut)

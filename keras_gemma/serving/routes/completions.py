"""OpenAI's `/v1/completions`."""

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from keras_gemma.causal_lm.text_engine import TextToken, TokenScore
from keras_gemma.serving.errors import ApiError, invalid
from keras_gemma.serving.generation import (
    Choice,
    Generation,
    best,
    score_prompt,
    submit,
    usage,
)
from keras_gemma.serving.json_body import JsonRoute
from keras_gemma.serving.json_response import JsonResponse
from keras_gemma.serving.request_log import RequestRecord, record_of
from keras_gemma.serving.routes.fingerprint import FINGERPRINT
from keras_gemma.serving.schemas.completions import CompletionBody
from keras_gemma.serving.service import Service, in_thread, service_of
from keras_gemma.serving.sse import DONE, event, stream, until_gone
from keras_gemma.serving.token_names import TokenNames

router = APIRouter(tags=["OpenAI"], route_class=JsonRoute)


@router.post("/v1/completions", summary="Continue prompts")
async def completions(body: CompletionBody, request: Request) -> Response:
    service, record = service_of(request), record_of(request.scope)
    record.is_stream = bool(body.stream)
    record.model = service.check_model(body.model)
    service.check_ready()
    prompts, texts = await in_thread(read_prompts, service, body)
    if service.settings.log_prompts:
        record.prompt = texts
    answer = CompletionAnswer(service, record, body, prompts, texts)
    if body.max_new_tokens:
        answer.generation = await until_gone(request, start(service, record, body, prompts))
    else:
        record.prompt_tokens = sum(map(len, prompts))
    if body.stream:
        return await stream(request, answer.events(), answer.close)
    return JsonResponse(await until_gone(request, answer.whole()))


def read_prompts(service: Service, body: CompletionBody) -> tuple[list[np.ndarray], list[str]]:
    """Returns ids and texts of the prompts.

    Raises:
        ApiError: If an id is not in the vocabulary, or a prompt is too long for the model.
    """
    texts, prompts = service.texts, body.prompts
    if len(prompts) > service.settings.max_choices:
        raise ApiError(
            400,
            f"A request may have at most {service.settings.max_choices} prompts. "
            f"Received: {len(prompts)}.",
            "too_many_choices",
            "prompt",
        )
    try:
        if isinstance(prompts[0], str):
            rows, strings = texts.encode(prompts), list(prompts)  # type: ignore[arg-type]
        else:
            rows = [texts.check_ids("prompt", ids) for ids in prompts]  # type: ignore[arg-type]
            strings = [texts.decode(row.tolist()) for row in rows]
    except Exception as error:
        raise invalid(error, "prompt") from error
    longest = max(map(len, rows))
    if longest > texts.max_length:
        raise ApiError(
            400,
            f"A prompt has {longest} tokens, but a sequence may have at most {texts.max_length}.",
            "context_length_exceeded",
            "prompt",
        )
    return rows, strings


async def start(
    service: Service, record: RequestRecord, body: CompletionBody, prompts: list[np.ndarray]
) -> Generation:
    """Adds the prompts to the engine."""
    settings = body.engine_settings(service.texts.stop_token_ids, record.key_salt)
    copies = max(body.n or 1, body.best_of or 1)
    if body.logprobs is not None:
        settings["top_logprobs"] = body.logprobs
    elif copies > (body.n or 1):
        settings["top_logprobs"] = 0  # `best_of` compares log-probabilities.
    if body.response_format is not None:
        response_format = body.response_format.model_dump(by_alias=True)
        try:
            settings["constraint"] = await service.constraint(response_format)
        except Exception as error:
            raise invalid(error, "response_format") from error
    return submit(service, record, prompts, body.max_new_tokens, body.stops, settings, copies)


class CompletionAnswer:
    """Response to one body, whole or in events."""

    def __init__(
        self,
        service: Service,
        record: RequestRecord,
        body: CompletionBody,
        prompts: list[np.ndarray],
        texts: list[str],
    ) -> None:
        self.service, self.record, self.body = service, record, body
        self.prompts, self.texts = prompts, texts
        self.generation: Generation | None = None
        self.names = TokenNames(
            service.texts.tokenizer.pieces, bool(body.return_tokens_as_token_ids)
        )
        self.count = body.n or 1
        self.base = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": record.model,
            "system_fingerprint": FINGERPRINT,
        }

    def close(self) -> None:
        """Cancels what has not ended."""
        if self.generation is not None:
            self.generation.close()

    async def whole(self) -> dict[str, Any]:
        """Returns the JSON response."""
        try:
            prompt_scores = await self._prompt_scores()
            choices = [
                Choice(finish_reason="length") for _ in self.prompts for _ in range(self.count)
            ]
            if self.generation is not None:
                choices = self._best(await self.generation.collect())
        finally:
            self.close()
        entries = []
        for index, choice in enumerate(choices):
            row = index // self.count
            text = (self.texts[row] if self.body.echo else "") + choice.text
            logprobs, _ = self._logprobs(prompt_scores[row], choice.tokens, 0)
            entries.append(self._entry(index, text, logprobs, choice.finish_reason))
        return {**self._base(), "choices": entries, "usage": self._usage()}

    async def events(self) -> AsyncIterator[str]:
        """Yields the events of a stream."""
        prompt_scores = await self._prompt_scores()
        offsets = [0] * len(self.prompts) * self.count
        if self.body.echo:
            for index in range(len(offsets)):
                row = index // self.count
                logprobs, offsets[index] = self._logprobs(prompt_scores[row], [], 0)
                yield self._chunk([self._entry(index, self.texts[row], logprobs, None)])
        if self.generation is None:
            for index in range(len(offsets)):
                yield self._chunk([self._entry(index, "", None, "length")])
        else:
            async for output in self.generation.outputs():
                index = output.index
                logprobs, offsets[index] = self._logprobs([], output.tokens, offsets[index])
                if output.text or (logprobs and output.tokens):
                    yield self._chunk([self._entry(index, output.text, logprobs, None)])
                if output.finish_reason is not None:
                    yield self._chunk([self._entry(index, "", None, output.finish_reason)])
        if self.body.includes_usage:
            yield event({**self._base(), "choices": [], "usage": self._usage()})
        yield DONE

    async def _prompt_scores(self) -> list[list[tuple[int, TokenScore | None]]]:
        """Returns id and score of each token of the prompts that are echoed."""
        count = self.body.logprobs
        if not self.body.echo or count is None:
            return [[] for _ in self.prompts]
        rows = []
        for ids in self.prompts:
            scores = await score_prompt(self.service, ids, count)
            rows.append(list(zip(ids.tolist(), scores, strict=True)))
        return rows

    def _best(self, choices: list[Choice]) -> list[Choice]:
        """Returns the best choices of each prompt."""
        copies = len(choices) // len(self.prompts)
        if copies == self.count:
            return choices
        rows = [choices[i : i + copies] for i in range(0, len(choices), copies)]
        return [choice for row in rows for choice in best(row, self.count)]

    def _logprobs(
        self, prompt: list[tuple[int, TokenScore | None]], tokens: list[TextToken], offset: int
    ) -> tuple[dict[str, Any] | None, int]:
        if self.body.logprobs is None:
            return None, offset
        scored = [*prompt, *((token.id, token.score) for token in tokens)]
        return self.names.completion_logprobs(scored, self.body.logprobs, offset)

    def _entry(self, index: int, text: str, logprobs: Any, reason: Any) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _base(self) -> dict[str, Any]:
        return self.base if self.generation is None else {**self.base, "seed": self.generation.seed}

    def _chunk(self, choices: list[Any]) -> str:
        body = {**self._base(), "choices": choices}
        return event({**body, "usage": None} if self.body.includes_usage else body)

    def _usage(self) -> dict[str, Any]:
        cached = 0 if self.generation is None else self.generation.cached_tokens
        return usage(self.record.prompt_tokens, self.record.completion_tokens, cached)

"""Routes of Text Generation Inference."""

from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from keras_gemma.causal_lm.text_engine import TextOutput, TextToken
from keras_gemma.serving.errors import ApiError, invalid
from keras_gemma.serving.generation import Choice, Generation, best, score_prompt, submit
from keras_gemma.serving.json_body import JsonRoute
from keras_gemma.serving.json_response import JsonResponse
from keras_gemma.serving.request_log import RequestRecord, record_of
from keras_gemma.serving.schemas.tgi import (
    MAX_BEST_OF,
    MAX_STOP_SEQUENCES,
    CompatBody,
    GenerateBody,
)
from keras_gemma.serving.service import Service, in_thread, service_of
from keras_gemma.serving.sse import event, stream, until_gone
from keras_gemma.serving.token_names import MIN_LOGPROB, TokenNames
from keras_gemma.version import __version__

router = APIRouter(tags=["TGI"], route_class=JsonRoute)


@router.post("/", summary="/generate or /generate_stream, by `stream`")
async def compat(body: CompatBody, request: Request) -> Response:
    if body.stream:
        return await generate_stream(body, request)
    response = await TgiAnswer(body, request).whole()
    return JsonResponse([response])


@router.post("/generate", summary="Continue a text")
async def generate(body: GenerateBody, request: Request) -> Response:
    return JsonResponse(await TgiAnswer(body, request).whole())


@router.post("/generate_stream", summary="Continue a text, in events")
async def generate_stream(body: GenerateBody, request: Request) -> Response:
    if (body.parameters.best_of or 1) > 1:
        raise ApiError(400, "`best_of` above 1 cannot be streamed.", param="parameters.best_of")
    if body.parameters.decoder_input_details:
        raise ApiError(400, "`decoder_input_details` cannot be streamed.")
    answer = TgiAnswer(body, request)
    answer.record.is_stream = True
    generation = await until_gone(request, answer.start())
    return await stream(request, answer.events(generation), generation.close)


@router.get("/info", summary="Model and limits")
async def info(request: Request) -> dict[str, Any]:
    service = service_of(request)
    engine, length = service.texts.engine, service.texts.max_length
    return {
        "model_id": service.model,
        "model_sha": None,
        "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": engine.max_batch_size,
        "max_best_of": MAX_BEST_OF,
        "max_stop_sequences": MAX_STOP_SEQUENCES,
        "max_input_tokens": length - 1,
        "max_total_tokens": length,
        "validation_workers": 1,
        "max_client_batch_size": 1,
        "router": "keras-gemma",
        "version": __version__,
        "sha": None,
        "docker_label": None,
        "is_pinned": engine.is_pinned,
    }


def truncate(ids: np.ndarray, length: int | None, start_token_id: int) -> np.ndarray:
    """Returns the last `length` ids, after the start token. `None` returns all."""
    if length is None or len(ids) <= length:
        return ids
    start = ids[:1] if ids[0] == start_token_id else ids[:0]
    return np.concatenate([start, ids[len(ids) - length + len(start) :]])


class TgiAnswer:
    """Response to one body, whole or in events."""

    def __init__(self, body: GenerateBody, request: Request) -> None:
        self.request, self.body = request, body
        self.parameters = body.parameters
        self.service: Service = service_of(request)
        self.record: RequestRecord = record_of(request.scope)
        self.record.model = self.service.model
        self.names = TokenNames(self.service.texts.tokenizer.pieces)

    async def start(self) -> Generation:
        """Adds the text to the engine."""
        service, parameters = self.service, self.parameters
        service.check_ready()
        if service.settings.log_prompts:
            self.record.prompt = self.body.inputs
        settings = parameters.engine_settings()
        try:
            (ids,) = await in_thread(service.texts.encode, [self.body.inputs])
            if parameters.grammar is not None:
                response_format = parameters.grammar.response_format()
                settings["constraint"] = await service.constraint(response_format)
        except Exception as error:
            raise invalid(error, "inputs") from error
        self.ids = truncate(ids, parameters.truncate, service.texts.tokenizer.start_token_id)
        return submit(
            service,
            self.record,
            [self.ids],
            parameters.max_new_tokens,
            parameters.stop or [],
            settings,
            parameters.best_of or 1,
        )

    async def whole(self) -> dict[str, Any]:
        """Returns the JSON response."""
        return await until_gone(self.request, self._whole())

    async def _whole(self) -> dict[str, Any]:
        generation = await self.start()
        choices = await generation.collect()
        first, *others = best(choices, len(choices))
        response: dict[str, Any] = {"generated_text": self._full_text(first.text)}
        if self.parameters.details or self.parameters.decoder_input_details:
            response["details"] = self._details(first, generation)
            response["details"]["prefill"] = await self._prefill()
            if others:
                response["details"]["best_of_sequences"] = [
                    {
                        "generated_text": self._full_text(choice.text),
                        **self._details(choice, generation),
                    }
                    for choice in others
                ]
        return response

    async def events(self, generation: Generation) -> AsyncIterator[str]:
        """Yields one event per token. The last one has the whole text."""
        choice = Choice()
        async for output in generation.outputs():
            choice.add(output)
            for i, token in enumerate(output.tokens):
                is_last = output.finish_reason is not None and i == len(output.tokens) - 1
                item: dict[str, Any] = {
                    "index": len(choice.tokens) - len(output.tokens) + i + 1,
                    "token": self._token(token, token.text + output.tail * is_last),
                    "top_tokens": self._top(token),
                    "generated_text": self._full_text(choice.text) if is_last else None,
                    "details": self._end(choice, generation) if is_last else None,
                }
                yield event(item)
            if output.finish_reason is not None and not output.tokens:
                yield event(self._tail(output, choice, generation))

    def _tail(self, output: TextOutput, choice: Choice, generation: Generation) -> dict[str, Any]:
        """Returns the last event of a sequence that ends without a token."""
        token = {"id": self.service.texts.tokenizer.pad_token_id, "text": output.tail}
        return {
            "index": len(choice.tokens) + 1,
            "token": {**token, "logprob": None, "special": False},
            "top_tokens": [],
            "generated_text": self._full_text(choice.text),
            "details": self._end(choice, generation),
        }

    def _full_text(self, text: str) -> str:
        return self.body.inputs + text if self.parameters.return_full_text else text

    def _end(self, choice: Choice, generation: Generation) -> dict[str, Any]:
        reason = "length"
        if choice.finish_reason == "stop":
            reason = "stop_sequence" if isinstance(choice.stop, str) else "eos_token"
        return {
            "finish_reason": reason,
            "generated_tokens": len(choice.tokens),
            "seed": None if self.parameters.is_greedy else generation.seed,
            "input_length": len(self.ids),
        }

    def _details(self, choice: Choice, generation: Generation) -> dict[str, Any]:
        details = {
            **self._end(choice, generation),
            "prefill": [],
            "tokens": [self._token(token, token.text) for token in choice.tokens],
        }
        if self.parameters.top_n_tokens:
            details["top_tokens"] = [self._top(token) for token in choice.tokens]
        return details

    async def _prefill(self) -> list[dict[str, Any]]:
        if not self.parameters.decoder_input_details:
            return []
        scores = await score_prompt(self.service, self.ids, 0)
        return [
            {"id": id, "text": self.names.string_of(id), "logprob": score and score.logprob}
            for id, score in zip(self.ids.tolist(), scores, strict=True)
        ]

    def _token(self, token: TextToken, text: str) -> dict[str, Any]:
        is_special = token.id in self.service.texts.stop_token_ids
        return {
            "id": token.id,
            "text": self.names.string_of(token.id) if is_special else text,
            "logprob": token.score and max(token.score.logprob, MIN_LOGPROB),
            "special": is_special,
        }

    def _top(self, token: TextToken) -> list[dict[str, Any]]:
        if token.score is None:
            return []
        return [
            {
                "id": id,
                "text": self.names.string_of(id),
                "logprob": max(logprob, MIN_LOGPROB),
                "special": id in self.service.texts.stop_token_ids,
            }
            for id, logprob in token.score.top
        ]

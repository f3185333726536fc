"""OpenAI's `/v1/chat/completions`."""

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from keras_gemma.serving.chat_generation import (
    ChatGeneration,
    ChatOutput,
    ChatRequest,
    Reply,
    start_chat,
)
from keras_gemma.serving.generation import usage
from keras_gemma.serving.json_body import JsonRoute
from keras_gemma.serving.json_response import JsonResponse
from keras_gemma.serving.request_log import RequestRecord, record_of
from keras_gemma.serving.routes.fingerprint import FINGERPRINT
from keras_gemma.serving.schemas.chat import ChatBody
from keras_gemma.serving.service import Service, service_of
from keras_gemma.serving.sse import DONE, event, stream, until_gone
from keras_gemma.serving.token_names import TokenNames
from keras_gemma.text.tool_calls import ToolCallDelta

router = APIRouter(tags=["OpenAI"], route_class=JsonRoute)


@router.post("/v1/chat/completions", summary="Reply to a conversation")
async def chat_completions(body: ChatBody, request: Request) -> Response:
    service, record = service_of(request), record_of(request.scope)
    record.is_stream = bool(body.stream)
    record.model = service.check_model(body.model)
    generation = await until_gone(
        request, start_chat(service, record, to_request(body, record, service))
    )
    answer = ChatAnswer(service, record, body, generation)
    if body.stream:
        return await stream(request, answer.events(), generation.close)
    replies = await until_gone(request, generation.collect())
    return JsonResponse(answer.whole(replies))


def to_request(body: ChatBody, record: RequestRecord, service: Service) -> ChatRequest:
    """Returns the conversation of a body."""
    settings = body.engine_settings(service.texts.stop_token_ids, record.key_salt)
    if body.logprobs:
        settings["top_logprobs"] = body.top_logprobs or 0
    choice = body.tool_choice
    return ChatRequest(
        messages=[message.to_chat_message() for message in body.messages],
        max_new_tokens=body.max_new_tokens,
        stops=body.stops,
        settings=settings,
        copies=body.n or 1,
        tools=[tool.model_dump(exclude_none=True) for tool in body.tools or ()],
        tool_choice=choice.model_dump() if choice and not isinstance(choice, str) else choice,
        parallel_calls=body.parallel_tool_calls is not False,
        response_format=body.response_format and body.response_format.model_dump(by_alias=True),
    )


class ChatAnswer:
    """Response to one body, whole or in events."""

    def __init__(
        self, service: Service, record: RequestRecord, body: ChatBody, generation: ChatGeneration
    ) -> None:
        self.service, self.record, self.body = service, record, body
        self.generation = generation
        self.names = TokenNames(
            service.texts.tokenizer.pieces, bool(body.return_tokens_as_token_ids)
        )
        self.base = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": record.model,
            "system_fingerprint": FINGERPRINT,
            "seed": generation.generation.seed,
        }

    def whole(self, replies: list[Reply]) -> dict[str, Any]:
        """Returns the JSON response."""
        choices = [
            {
                "index": index,
                "message": message_of(reply),
                "logprobs": self._logprobs(reply),
                "finish_reason": reply.finish_reason,
            }
            for index, reply in enumerate(replies)
        ]
        return {
            **self.base,
            "object": "chat.completion",
            "choices": choices,
            "usage": self._usage(),
        }

    async def events(self) -> AsyncIterator[str]:
        """Yields the events of a stream."""
        is_started = False
        async for output in self.generation.outputs():
            if not is_started:
                is_started = True
                for index in range(self.body.n or 1):
                    yield self._chunk(index, {"role": "assistant", "content": ""})
            if output.text or (self.body.logprobs and output.tokens):
                yield self._chunk(output.index, {"content": output.text}, self._logprobs(output))
            if output.calls:
                calls = [call_delta(piece) for piece in output.calls]
                yield self._chunk(output.index, {"tool_calls": calls})
            if output.finish_reason is not None:
                yield self._chunk(output.index, {}, None, output.finish_reason)
        if self.body.includes_usage:
            yield event(self._chunk_body([], self._usage()))
        yield DONE

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None
    ) -> str:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return event(self._chunk_body([choice], None))

    def _chunk_body(self, choices: list[Any], usage: dict[str, Any] | None) -> dict[str, Any]:
        body = {**self.base, "object": "chat.completion.chunk", "choices": choices}
        return {**body, "usage": usage} if self.body.includes_usage else body

    def _logprobs(self, output: Reply | ChatOutput) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        content = self.names.chat_logprobs(output.tokens, self.body.top_logprobs or 0)
        return {"content": content, "refusal": None}

    def _usage(self) -> dict[str, Any]:
        record = self.record
        return usage(
            record.prompt_tokens,
            record.completion_tokens,
            self.generation.generation.cached_tokens,
        )


def message_of(reply: Reply) -> dict[str, Any]:
    """Returns the message of a reply."""
    message: dict[str, Any] = {"role": "assistant", "content": reply.text, "refusal": None}
    if reply.calls:
        message["content"] = reply.text or None
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in reply.calls
        ]
    return message


def call_delta(piece: ToolCallDelta) -> dict[str, Any]:
    """Returns the delta of a piece of a call."""
    if piece.name is None:
        return {"index": piece.index, "function": {"arguments": piece.arguments}}
    return {
        "index": piece.index,
        "id": piece.id,
        "type": "function",
        "function": {"name": piece.name, "arguments": piece.arguments},
    }

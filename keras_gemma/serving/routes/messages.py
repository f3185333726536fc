"""Anthropic's `/v1/messages`."""

import json
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from keras_gemma.serving.chat_generation import (
    ChatGeneration,
    ChatRequest,
    Reply,
    prepare,
    start_chat,
)
from keras_gemma.serving.errors import invalid
from keras_gemma.serving.json_body import JsonRoute
from keras_gemma.serving.json_response import JsonResponse
from keras_gemma.serving.request_log import RequestRecord, record_of
from keras_gemma.serving.schemas.messages import CountBody, MessagesBody
from keras_gemma.serving.service import in_thread, service_of
from keras_gemma.serving.sse import event, stream, until_gone

router = APIRouter(tags=["Anthropic"], route_class=JsonRoute)

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
"""Stop reason by finish reason."""


@router.post("/v1/messages", summary="Reply to a conversation")
async def messages(body: MessagesBody, request: Request) -> Response:
    service, record = service_of(request), record_of(request.scope)
    record.is_stream = bool(body.stream)
    record.model = service.check_model(body.model)
    chat = ChatRequest(
        messages=body.to_chat_messages(),
        max_new_tokens=body.max_tokens,
        stops=body.stop_sequences or [],
        settings=body.engine_settings(record.key_salt),
        tools=body.functions,
        tool_choice=body.tool_choice.to_choice() if body.tool_choice else "auto",
        parallel_calls=not (body.tool_choice and body.tool_choice.disable_parallel_tool_use),
    )
    generation = await until_gone(request, start_chat(service, record, chat))
    answer = MessagesAnswer(record, generation)
    if body.stream:
        return await stream(request, answer.events(), generation.close)
    (reply,) = await until_gone(request, generation.collect())
    return JsonResponse(answer.whole(reply))


@router.post("/v1/messages/count_tokens", summary="Count the tokens of a conversation")
async def count_tokens(body: CountBody, request: Request) -> dict[str, int]:
    service = service_of(request)
    service.check_model(body.model)
    chat = ChatRequest(body.to_chat_messages(), None, [], {}, tools=body.functions)
    try:
        prompt = await in_thread(prepare, service.texts, chat)
    except Exception as error:
        raise invalid(error, "messages") from error
    return {"input_tokens": len(prompt.ids)}


class MessagesAnswer:
    """Response to one body, whole or in events."""

    def __init__(self, record: RequestRecord, generation: ChatGeneration) -> None:
        self.record, self.generation = record, generation
        self.id = f"msg_{uuid.uuid4().hex}"

    def whole(self, reply: Reply) -> dict[str, Any]:
        """Returns the JSON response."""
        blocks: list[dict[str, Any]] = []
        if reply.text or not reply.calls:
            blocks.append({"type": "text", "text": reply.text})
        for call in reply.calls:
            value = json.loads(call.arguments or "{}")
            blocks.append({"type": "tool_use", "id": call.id, "name": call.name, "input": value})
        ending = self._ending(reply.finish_reason, reply.stop)
        return {**self._message(), "content": blocks, **ending}

    async def events(self) -> AsyncIterator[str]:
        """Yields the events of a stream."""
        index, kind = -1, None  # number and kind of the open block
        is_started = False
        async for output in self.generation.outputs():
            if not is_started:
                is_started = True
                yield self._event("message_start", message=self._message())
                yield self._event("ping")
            if output.text or (output.finish_reason and index < 0 and not output.calls):
                if kind != "text":
                    if kind is not None:
                        yield self._event("content_block_stop", index=index)
                    index, kind = index + 1, "text"
                    block = {"type": "text", "text": ""}
                    yield self._event("content_block_start", index=index, content_block=block)
                delta = {"type": "text_delta", "text": output.text}
                yield self._event("content_block_delta", index=index, delta=delta)
            for piece in output.calls:
                if kind != f"call {piece.index}":
                    if kind is not None:
                        yield self._event("content_block_stop", index=index)
                    index, kind = index + 1, f"call {piece.index}"
                    block = {"type": "tool_use", "id": piece.id, "name": piece.name, "input": {}}
                    yield self._event("content_block_start", index=index, content_block=block)
                delta = {"type": "input_json_delta", "partial_json": piece.arguments}
                yield self._event("content_block_delta", index=index, delta=delta)
            if output.finish_reason is not None:
                yield self._event("content_block_stop", index=index)
                ending = self._ending(output.finish_reason, output.stop)
                yield self._event("message_delta", delta=ending, usage=self._usage())
                yield self._event("message_stop")

    def _message(self) -> dict[str, Any]:
        """Returns a message without content."""
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.record.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage(),
        }

    def _ending(self, reason: str | None, stop: str | None) -> dict[str, Any]:
        stop_reason = "stop_sequence" if stop is not None else STOP_REASONS[reason or "stop"]
        return {"stop_reason": stop_reason, "stop_sequence": stop}

    def _usage(self) -> dict[str, int]:
        cached = self.generation.generation.cached_tokens
        return {
            "input_tokens": self.record.prompt_tokens - cached,
            "output_tokens": self.record.completion_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
        }

    def _event(self, name: str, **fields: Any) -> str:
        return event({"type": name, **fields}, name)

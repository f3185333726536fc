"""OpenAI's `/v1/responses`, without state: nothing is stored."""

import dataclasses
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from keras_gemma.serving.chat_generation import (
    ChatGeneration,
    ChatRequest,
    Reply,
    joined,
    start_chat,
)
from keras_gemma.serving.errors import to_api_error
from keras_gemma.serving.json_body import JsonRoute
from keras_gemma.serving.json_response import JsonResponse
from keras_gemma.serving.request_log import RequestRecord, record_of
from keras_gemma.serving.schemas.responses import ResponsesBody, ResponseToolChoice
from keras_gemma.serving.service import Service, service_of
from keras_gemma.serving.sse import event, stream, until_gone
from keras_gemma.text.tool_calls import ToolCallDelta

router = APIRouter(tags=["OpenAI"], route_class=JsonRoute)


@router.post("/v1/responses", summary="Reply to an input")
async def responses(body: ResponsesBody, request: Request) -> Response:
    service, record = service_of(request), record_of(request.scope)
    record.is_stream = bool(body.stream)
    record.model = service.check_model(body.model)
    chat = to_request(body, record, service)
    generation = await until_gone(request, start_chat(service, record, chat))
    answer = ResponsesAnswer(record, body, generation)
    if body.stream:
        return await stream(request, answer.events(), generation.close)
    (reply,) = await until_gone(request, generation.collect())
    return JsonResponse(answer.whole(reply))


def to_request(body: ResponsesBody, record: RequestRecord, service: Service) -> ChatRequest:
    """Returns the conversation of a body."""
    choice: Any = body.tool_choice
    if isinstance(choice, ResponseToolChoice):
        choice = {"type": "function", "function": {"name": choice.name}}
    text_format = body.text and body.text.format
    return ChatRequest(
        messages=body.to_chat_messages(),
        max_new_tokens=body.max_output_tokens,
        stops=body.stops,
        settings=body.engine_settings(service.texts.stop_token_ids, record.key_salt),
        tools=[tool.to_function() for tool in body.tools or ()],
        tool_choice=choice,
        parallel_calls=body.parallel_tool_calls is not False,
        response_format=text_format.response_format() if text_format else None,
    )


def new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"


def message_item(id: str, text: str | None, status: str = "completed") -> dict[str, Any]:
    """Returns the item of a text. `None` is a text that has not begun."""
    content = [] if text is None else [text_part(text)]
    item = {"type": "message", "id": id, "status": status, "role": "assistant"}
    return {**item, "content": content}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def call_item(id: str, call: ToolCallDelta, status: str = "completed") -> dict[str, Any]:
    """Returns the item of a function call."""
    return {
        "type": "function_call",
        "id": id,
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments,
        "status": status,
    }


class ResponsesAnswer:
    """Response to one body, whole or in events."""

    def __init__(
        self, record: RequestRecord, body: ResponsesBody, generation: ChatGeneration
    ) -> None:
        self.record, self.body, self.generation = record, body, generation
        self.id, self.created = new_id("resp"), int(time.time())
        self.number = 0

    def whole(self, reply: Reply) -> dict[str, Any]:
        """Returns the JSON response."""
        items = [call_item(new_id("fc"), call) for call in reply.calls]
        if reply.text or not items:
            items.insert(0, message_item(new_id("msg"), reply.text))
        return self._response(items, reply.finish_reason)

    async def events(self) -> AsyncIterator[str]:
        """Yields the events of a stream."""
        items = OutputItems(self._event)
        reason = None
        is_started = False
        try:
            async for output in self.generation.outputs():
                if not is_started:
                    is_started = True
                    for name in ("created", "in_progress"):
                        yield self._event(f"response.{name}", response=self._response([]))
                for item in items.add(output.text, output.calls):
                    yield item
                reason = output.finish_reason
        except Exception as error:
            if is_started:
                failure = to_api_error(error)
                response = self._response(items.done, status="failed")
                response["error"] = {"code": "server_error", "message": failure.message}
                yield self._event("response.failed", response=response)
            raise
        if not items.done and not items.is_open:
            for item in items.open_text():
                yield item
        for item in items.close():
            yield item
        response = self._response(items.done, reason)
        yield self._event(f"response.{response['status']}", response=response)

    def _event(self, name: str, /, **fields: Any) -> str:
        number = self.number
        self.number += 1
        return event({"type": name, "sequence_number": number, **fields}, name)

    def _response(
        self, items: list[Any], reason: str | None = None, status: str = "in_progress"
    ) -> dict[str, Any]:
        body, usage, incomplete = self.body, None, None
        if reason is not None:
            status = "incomplete" if reason == "length" else "completed"
            incomplete = {"reason": "max_output_tokens"} if reason == "length" else None
            usage = self._usage()
        text_format = body.text and body.text.format
        choice = body.tool_choice
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": incomplete,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self.record.model,
            "output": list(items),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "seed": self.generation.generation.seed,
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {
                "format": text_format.model_dump(by_alias=True, exclude_none=True)
                if text_format
                else {"type": "text"}
            },
            "tool_choice": choice.model_dump()
            if isinstance(choice, ResponseToolChoice)
            else choice or "auto",
            "tools": [tool.model_dump(exclude_none=True) for tool in body.tools or ()],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": usage,
            "user": None,
        }

    def _usage(self) -> dict[str, Any]:
        record = self.record
        return {
            "input_tokens": record.prompt_tokens,
            "input_tokens_details": {"cached_tokens": self.generation.generation.cached_tokens},
            "output_tokens": record.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": record.prompt_tokens + record.completion_tokens,
        }


class OutputItems:
    """Items of a stream: texts and calls, of which the last may be open.

    Args:
        event: Function that returns an event, given its name and fields.
    """

    def __init__(self, event: Any) -> None:
        self.event = event
        self.done: list[dict[str, Any]] = []
        self.id = ""
        self.text: str | None = None
        self.call: ToolCallDelta | None = None

    @property
    def is_open(self) -> bool:
        """True if an item has begun and not ended."""
        return self.text is not None or self.call is not None

    def add(self, text: str, calls: list[ToolCallDelta]) -> list[str]:
        """Returns the events of new text and new pieces of calls."""
        events: list[str] = []
        if text:
            if self.text is None:
                events += self.close()
                events += self.open_text()
            self.text = (self.text or "") + text
            events.append(self._place("response.output_text.delta", delta=text, logprobs=[]))
        for piece in calls:
            if self.call is None or self.call.index != piece.index:
                events += self.close()
                events += self._open_call(piece)
            if piece.arguments and self.call is not None:
                self.call = joined(self.call, piece)
                name = "response.function_call_arguments.delta"
                events.append(self._item_event(name, delta=piece.arguments))
        return events

    def open_text(self) -> list[str]:
        """Returns the events of a text that begins."""
        self.id, self.text = new_id("msg"), ""
        item = message_item(self.id, None, "in_progress")
        return [
            self.event("response.output_item.added", output_index=len(self.done), item=item),
            self._place("response.content_part.added", part=text_part("")),
        ]

    def _open_call(self, piece: ToolCallDelta) -> list[str]:
        self.id, self.call = new_id("fc"), dataclasses.replace(piece, arguments="")
        item = call_item(self.id, self.call, "in_progress")
        name = "response.output_item.added"
        return [self.event(name, output_index=len(self.done), item=item)]

    def close(self) -> list[str]:
        """Returns the events of the end of the open item."""
        if self.text is not None:
            item = message_item(self.id, self.text)
            events = [
                self._place("response.output_text.done", text=self.text, logprobs=[]),
                self._place("response.content_part.done", part=text_part(self.text)),
            ]
        elif self.call is not None:
            item = call_item(self.id, self.call)
            name = "response.function_call_arguments.done"
            events = [self._item_event(name, arguments=self.call.arguments, name=self.call.name)]
        else:
            return []
        events.append(
            self.event("response.output_item.done", output_index=len(self.done), item=item)
        )
        self.done.append(item)
        self.text = self.call = None
        return events

    def _item_event(self, name: str, /, **fields: Any) -> str:
        return self.event(name, item_id=self.id, output_index=len(self.done), **fields)

    def _place(self, name: str, /, **fields: Any) -> str:
        return self._item_event(name, content_index=0, **fields)

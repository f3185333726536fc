"""Replies of a conversation: text and tool calls, for the three APIs that have them."""

import dataclasses
import functools
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np

from keras_gemma.causal_lm.text_engine import TextEngine, TextToken
from keras_gemma.serving.chat_prompt import ChatMessage, encode_chat
from keras_gemma.serving.errors import invalid
from keras_gemma.serving.generation import Generation, submit
from keras_gemma.serving.request_log import RequestRecord
from keras_gemma.serving.service import Service, in_thread
from keras_gemma.text.tool_calls import Delta, TextDelta, ToolCallDelta, ToolParser, read_tools
from keras_gemma.text.tools import tool_format_of


@dataclasses.dataclass
class ChatRequest:
    """Conversation, and how to reply."""

    messages: list[ChatMessage]
    max_new_tokens: int | None
    stops: list[str]
    settings: dict[str, Any]
    """Further arguments of `EngineRequest`."""
    copies: int = 1
    tools: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Functions in OpenAI's format: `{"type": "function", "function": {...}}`."""
    tool_choice: Any = "auto"
    """`"none"`, `"auto"`, `"required"`, or a function as in OpenAI's format."""
    parallel_calls: bool = True
    """True if the reply may have several calls."""
    response_format: dict[str, Any] | None = None


@dataclasses.dataclass
class ChatOutput:
    """New part of one reply."""

    index: int
    text: str
    calls: list[ToolCallDelta]
    tokens: list[TextToken]
    """New tokens, for log-probabilities, without a stop token."""
    finish_reason: str | None
    """`"stop"`, `"length"` or `"tool_calls"`."""
    stop: str | None
    """Stop string that ended the reply."""


@dataclasses.dataclass
class Reply:
    """One complete reply."""

    text: str = ""
    calls: list[ToolCallDelta] = dataclasses.field(default_factory=list)
    tokens: list[TextToken] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    stop: str | None = None

    def add(self, output: ChatOutput) -> None:
        """Adds a part, and joins the pieces of each call."""
        self.text += output.text
        self.tokens += output.tokens
        self.finish_reason, self.stop = output.finish_reason, output.stop
        for piece in output.calls:
            if self.calls and self.calls[-1].index == piece.index:
                piece = joined(self.calls.pop(), piece)
            self.calls.append(piece)


class ChatGeneration:
    """Replies of one HTTP request."""

    def __init__(self, generation: Generation, parsers: list[ToolParser | None]) -> None:
        self.generation = generation
        self.parsers = parsers
        self.close = generation.close

    async def outputs(self) -> AsyncIterator[ChatOutput]:
        """Yields the parts of all replies."""
        has_calls = [False] * sum(len(handle.sequences) for handle in self.generation.handles)
        async for output in self.generation.outputs():
            text, calls = output.text, []
            reason = output.finish_reason
            parser = self.parsers[output.index]
            if parser is not None:
                deltas = parser.push(text) if text else []
                if reason is not None:
                    deltas = [*deltas, *parser.finish()]
                text, calls = split(deltas)
                has_calls[output.index] |= bool(calls)
                if reason == "stop" and has_calls[output.index]:
                    reason = "tool_calls"
            tokens = output.tokens
            if isinstance(output.stop, int) and tokens:
                tokens = tokens[:-1]
            stop = output.stop if isinstance(output.stop, str) else None
            yield ChatOutput(output.index, text, calls, tokens, reason, stop)

    async def collect(self) -> list[Reply]:
        """Returns all replies."""
        replies = [Reply() for handle in self.generation.handles for _ in handle.sequences]
        try:
            async for output in self.outputs():
                replies[output.index].add(output)
        finally:
            self.close()
        return replies


def split(deltas: list[Delta]) -> tuple[str, list[ToolCallDelta]]:
    """Returns the text and the pieces of calls that a `ToolParser` returned."""
    text, calls = "", []
    for delta in deltas:
        if isinstance(delta, TextDelta):
            text += delta.text
        else:
            calls.append(delta)
    return text, calls


def joined(call: ToolCallDelta, piece: ToolCallDelta) -> ToolCallDelta:
    """Returns the beginning of a call with its next piece."""
    return dataclasses.replace(call, arguments=call.arguments + piece.arguments)


async def start_chat(
    service: Service, record: RequestRecord, request: ChatRequest
) -> ChatGeneration:
    """Adds a conversation to the engine.

    Raises:
        ApiError: If the conversation is invalid, or refused.
    """
    service.check_ready()
    if service.settings.log_prompts:
        record.prompt = [f"{message.role}: {message.text}" for message in request.messages]
    try:
        prompt = await in_thread(prepare, service.texts, request)
        constraint = None
        if prompt.response_format is not None:
            constraint = await service.constraint(prompt.response_format)
    except Exception as error:
        raise invalid(error, "messages") from error
    settings = {**request.settings, "constraint": constraint}
    ids, copies = prompt.ids, request.copies
    generation = submit(
        service, record, [ids], request.max_new_tokens, request.stops, settings, copies
    )
    return ChatGeneration(generation, [prompt.parser() for _ in range(copies)])


@dataclasses.dataclass
class Prompt:
    """Conversation that is ready for the engine."""

    ids: np.ndarray
    response_format: dict[str, Any] | None = None
    parser: Callable[[], ToolParser | None] = lambda: None
    """Function that returns a new `ToolParser`, or `None` if there are no tools."""


def prepare(texts: TextEngine, request: ChatRequest) -> Prompt:
    """Returns the ids, the response format and the parser of a conversation.

    Raises:
        ValueError: If the conversation, its tools or its response format are invalid.
    """
    tool_dicts = [] if request.tool_choice == "none" else request.tools
    tool_format, tools = None, []
    if tool_dicts or any(message.calls or message.role == "tool" for message in request.messages):
        tool_format, tools = tool_format_of(texts.tokenizer), read_tools(tool_dicts)
    ids = encode_chat(texts.tokenizer, request.messages, tools, tool_format)
    prompt = Prompt(ids, request.response_format)
    if tools and tool_format is not None:
        arguments = tools, request.tool_choice or "auto", request.parallel_calls
        prompt.response_format = tool_format.response_format(*arguments) or prompt.response_format
        prompt.parser = functools.partial(tool_format.parser, tools)
    return prompt

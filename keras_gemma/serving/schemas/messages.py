"""Body of Anthropic's `/v1/messages`."""

import json
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from keras_gemma.serving.chat_prompt import ChatMessage, MessageCall
from keras_gemma.serving.schemas.chat import MAX_MESSAGES
from keras_gemma.serving.schemas.sampling import MAX_STOPS, Body, StopString, random_settings

IGNORED_BLOCKS = ("thinking", "redacted_thinking")
"""Types of content blocks that are left out."""

BLOCKS = ("text", "tool_use", "tool_result", *IGNORED_BLOCKS)
"""Types of content blocks."""


class Block(Body):
    """Content block."""

    type: str
    text: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: "str | list[Block] | None" = None

    @model_validator(mode="after")
    def check_fields(self) -> "Block":
        if self.type not in BLOCKS:
            raise ValueError(
                f"blocks of type {self.type!a:.40} are not supported, because the model reads only "
                "text. Send blocks of type 'text'"
            )
        needed = {"text": "text", "tool_use": "name", "tool_result": "tool_use_id"}.get(self.type)
        if needed is not None and getattr(self, needed) is None:
            raise ValueError(f"a block of type {self.type!r} must have a `{needed}`")
        return self


def text_of(content: str | list[Block] | None) -> str:
    """Returns the text of a content."""
    if isinstance(content, list):
        return "".join(block.text or "" for block in content if block.type == "text")
    return content or ""


class MessageParam(Body):
    """Message of a conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]

    def to_chat_messages(self) -> list[ChatMessage]:
        """Returns the results of tools, and then the text and the calls."""
        if isinstance(self.content, str):
            return [ChatMessage(self.role, self.content)]
        messages, calls = [], []
        for block in self.content:
            if block.type == "tool_result":
                text, call_id = text_of(block.content), block.tool_use_id or ""
                messages.append(ChatMessage("tool", text, call_id=call_id))
            elif block.type == "tool_use":
                arguments = json.dumps(block.input or {}, ensure_ascii=False)
                calls.append(MessageCall(block.id or "", block.name or "", arguments))
        text = text_of(self.content)
        if text or calls or not messages:
            messages.append(ChatMessage(self.role, text, calls))
        return messages


class AnthropicTool(Body):
    """Function that the model may call."""

    name: str = Field(min_length=1, max_length=128)
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None

    @model_validator(mode="after")
    def check_type(self) -> "AnthropicTool":
        if self.type not in (None, "custom"):
            raise ValueError(f"tools of type {self.type!a:.40} are not supported. Use 'custom'")
        return self

    def to_function(self) -> dict[str, Any]:
        """Returns the tool in OpenAI's format."""
        function: dict[str, Any] = {"name": self.name, "parameters": self.input_schema or {}}
        if self.description is not None:
            function["description"] = self.description
        return {"type": "function", "function": function}


class AnthropicToolChoice(Body):
    """Choice of a tool."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def check_name(self) -> "AnthropicToolChoice":
        if self.type == "tool" and not self.name:
            raise ValueError("a choice of type 'tool' must have a `name`")
        return self

    def to_choice(self) -> Any:
        """Returns the choice in OpenAI's format."""
        if self.type == "tool":
            return {"type": "function", "function": {"name": self.name}}
        return {"auto": "auto", "any": "required", "none": "none"}[self.type]


class CountBody(Body):
    """Body of `/v1/messages/count_tokens`."""

    model: str | None = None
    messages: Annotated[list[MessageParam], Field(min_length=1, max_length=MAX_MESSAGES)]
    system: str | list[Block] | None = None
    tools: list[AnthropicTool] | None = Field(None, max_length=128)
    tool_choice: AnthropicToolChoice | None = None

    def to_chat_messages(self) -> list[ChatMessage]:
        """Returns the conversation."""
        system = text_of(self.system)
        messages = [ChatMessage("system", system)] if system else []
        return messages + [m for message in self.messages for m in message.to_chat_messages()]

    @property
    def functions(self) -> list[dict[str, Any]]:
        """Tools in OpenAI's format."""
        return [tool.to_function() for tool in self.tools or ()]


class MessagesBody(CountBody):
    """Body of `/v1/messages`."""

    max_tokens: int = Field(ge=1)
    stream: bool | None = None
    stop_sequences: list[StopString] | None = Field(None, max_length=MAX_STOPS)
    temperature: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0)
    top_p: float | None = Field(None, ge=0, le=1)

    def engine_settings(self, salt: str) -> dict[str, Any]:
        """Returns the arguments of `EngineRequest` that this body sets."""
        settings = random_settings(self.temperature, self.top_k, self.top_p)
        return {**settings, "cache_salt": salt}

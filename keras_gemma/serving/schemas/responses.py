"""Body of `/v1/responses`: the subset that needs no state on the server."""

from typing import Any, Literal

from pydantic import Field, model_validator

from keras_gemma.serving.chat_prompt import ChatMessage, MessageCall
from keras_gemma.serving.schemas.chat import Content, Message, text_of
from keras_gemma.serving.schemas.sampling import Body, SamplingBody

ITEM_TYPES = ("message", "function_call", "function_call_output", "reasoning")
"""Types of input items. Reasoning is ignored."""


class InputItem(Body):
    """Item of the input."""

    type: str = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Content = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: Content = None

    @model_validator(mode="before")
    @classmethod
    def drop_reasoning(cls, value: Any) -> Any:
        is_reasoning = isinstance(value, dict) and value.get("type") == "reasoning"
        return {"type": "reasoning"} if is_reasoning else value

    @model_validator(mode="after")
    def check_fields(self) -> "InputItem":
        if self.type not in ITEM_TYPES:
            raise ValueError(
                f"items of type {self.type!a:.40} are not supported. Use {', '.join(ITEM_TYPES)}"
            )
        if self.type == "message" and self.role is None:
            raise ValueError("a message must have a `role`")
        if self.type == "function_call" and not (self.call_id and self.name):
            raise ValueError("a function call must have a `call_id` and a `name`")
        if self.type == "function_call_output" and not self.call_id:
            raise ValueError("a function call output must have a `call_id`")
        return self

    def to_chat_messages(self) -> list[ChatMessage]:
        """Returns the item as messages, none for reasoning."""
        if self.type == "message":
            return [Message(role=self.role, content=self.content).to_chat_message()]
        if self.type == "function_call":
            call = MessageCall(self.call_id or "", self.name or "", self.arguments or "{}")
            return [ChatMessage("assistant", calls=[call])]
        if self.type == "function_call_output":
            return [ChatMessage("tool", text_of(self.output), call_id=self.call_id or "")]
        return []


class ResponseTool(Body):
    """Function that the model may call."""

    type: str
    name: str | None = Field(None, min_length=1, max_length=64)
    description: str | None = None
    parameters: dict[str, Any] | None = None

    @model_validator(mode="after")
    def check_fields(self) -> "ResponseTool":
        if self.type != "function":
            raise ValueError(f"tools of type {self.type!a:.40} are not supported. Use 'function'")
        if self.name is None:
            raise ValueError("a function must have a `name`")
        return self

    def to_function(self) -> dict[str, Any]:
        """Returns the tool in the format of chat completions."""
        fields = self.model_dump(include={"name", "description", "parameters"}, exclude_none=True)
        return {"type": "function", "function": fields}


class ResponseToolChoice(Body):
    """Function that the model must call."""

    type: Literal["function"]
    name: str


class TextFormat(Body):
    """Format of the text."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    def response_format(self) -> dict[str, Any] | None:
        """Returns the format as in chat completions."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return {"type": "json_object"}
        schema = {"name": self.name or "schema", "schema": self.schema_ or {}}
        return {"type": "json_schema", "json_schema": schema}


class TextOptions(Body):
    """Options of the text."""

    format: TextFormat | None = None


class ResponsesBody(SamplingBody):
    """Body of `/v1/responses`."""

    input: str | list[InputItem]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None
    text: TextOptions | None = None
    tools: list[ResponseTool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, Any] | None = None

    @model_validator(mode="after")
    def check_fields(self) -> "ResponsesBody":
        for name in ("previous_response_id", "conversation", "background"):
            if getattr(self, name):
                raise ValueError(
                    f"`{name}` is not supported, because the server stores no responses. Send the "
                    "whole conversation as `input`"
                )
        return self

    def to_chat_messages(self) -> list[ChatMessage]:
        """Returns the conversation."""
        messages = [ChatMessage("system", self.instructions)] if self.instructions else []
        if isinstance(self.input, str):
            return [*messages, ChatMessage("user", self.input)]
        return messages + [m for item in self.input for m in item.to_chat_messages()]

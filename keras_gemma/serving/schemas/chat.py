"""Body of `/v1/chat/completions`."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from keras_gemma.serving.chat_prompt import ChatMessage, MessageCall
from keras_gemma.serving.schemas.sampling import Body, SamplingBody

MAX_MESSAGES = 10_000
"""Maximum number of messages."""


class Part(Body):
    """Part of a content. The models read text only."""

    type: str
    text: str | None = None

    @model_validator(mode="after")
    def check_text(self) -> "Part":
        is_text = self.type in ("text", "input_text", "output_text", "refusal")
        if not is_text:
            raise ValueError(
                f"parts of type {self.type!a:.40} are not supported, because the model reads only "
                "text. Send parts of type 'text'"
            )
        if self.text is None and self.type != "refusal":
            raise ValueError("a part of type 'text' must have a `text`")
        return self


Content = str | list[Part] | None
"""Content of a message."""


def text_of(content: Content) -> str:
    """Returns the text of a content."""
    if isinstance(content, list):
        return "".join(part.text or "" for part in content)
    return content or ""


class CalledFunction(Body):
    """Function of a tool call."""

    name: str
    arguments: str | None = None


class Call(Body):
    """Tool call of an assistant message."""

    id: str | None = None
    function: CalledFunction


class Message(Body):
    """Message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "model", "tool", "function"]
    content: Content = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None

    def to_chat_message(self) -> ChatMessage:
        """Returns the message with the roles of the server."""
        roles = {"developer": "system", "model": "assistant", "function": "tool"}
        calls = [
            MessageCall(call.id or "", call.function.name, call.function.arguments or "{}")
            for call in self.tool_calls or ()
        ]
        return ChatMessage(
            roles.get(self.role, self.role), text_of(self.content), calls, self.tool_call_id or ""
        )


class FunctionDefinition(Body):
    """Definition of a function."""

    name: str = Field(min_length=1, max_length=64)
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Body):
    """Tool that the model may call."""

    type: Literal["function"] = "function"
    function: FunctionDefinition


class NamedFunction(Body):
    """Name of a function."""

    name: str


class ToolChoice(Body):
    """Function that the model must call."""

    type: Literal["function"] = "function"
    function: NamedFunction


class ResponseFormat(Body):
    """Format of the reply. Its other fields depend on the type."""

    type: Literal["text", "json_object", "json_schema", "regex", "lark", "choice"]


class ChatBody(SamplingBody):
    """Body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    return_tokens_as_token_ids: bool | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def check_fields(self) -> "ChatBody":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("`top_logprobs` needs `logprobs` to be true")
        names = [tool.function.name for tool in self.tools or ()]
        if isinstance(self.tool_choice, ToolChoice):
            name = self.tool_choice.function.name
            if name not in names:
                raise ValueError(f"`tool_choice` names {name!a:.70}, which `tools` does not have")
        if self.tool_choice == "required" and not names:
            raise ValueError("`tool_choice` is 'required', but `tools` is empty")
        return self

    @property
    def max_new_tokens(self) -> int | None:
        """Maximum number of new tokens. `None` allows the rest of the context."""
        return self.max_completion_tokens or self.max_tokens

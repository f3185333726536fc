"""Conversations as clients send them, made into the strict turns of the model.

Knows nothing about HTTP and the three APIs, which convert their messages to `ChatMessage`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_gemma.text.tokenizer import GemmaTokenizer


@dataclasses.dataclass
class MessageCall:
    """Call in a message of a client. The ones of an answer are `ToolCallDelta`."""

    id: str
    name: str
    arguments: str
    """Arguments as JSON."""


@dataclasses.dataclass
class ChatMessage:
    """Message of a conversation."""

    role: str
    """`"system"`, `"user"`, `"assistant"` or `"tool"`."""
    text: str = ""
    calls: list[MessageCall] = dataclasses.field(default_factory=list)
    """Calls of an assistant message."""
    call_id: str = ""
    """Call that a tool message answers."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the message in OpenAI's format."""
        message: dict[str, Any] = {"role": self.role, "content": self.text}
        if self.calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in self.calls
            ]
        if self.role == "tool":
            message["tool_call_id"] = self.call_id
        return message


def encode_chat(
    tokenizer: GemmaTokenizer,
    messages: Sequence[ChatMessage],
    tools: Sequence[Any] = (),
    tool_format: Any = None,
) -> np.ndarray:
    """Returns the ids of a conversation and the beginning of the model's turn, int32 `[T]`.

    Messages of one role in a row are merged. A later system message becomes part of the user turn
    at its place. If the last message is the assistant's, the model continues it.

    Args:
        tokenizer: Tokenizer of the model.
        messages: The conversation.
        tools: Tools that the model may call.
        tool_format: The `ToolFormat` of the model, if there are tools, calls or results.

    Raises:
        ValueError: If the conversation is empty, or the first one after system messages is the
            assistant's.
    """
    if not messages:
        raise ValueError("`messages` must have at least one message. Received: an empty list")
    turns, continued = merge(messages), ""
    if turns[-1].role == "assistant" and not turns[-1].calls:
        continued = turns.pop().text
    if not turns or turns[0].role == "assistant":
        raise ValueError(
            "`messages` must begin with a user message, after optional system messages. "
            "Received: an assistant message first"
        )
    rows = [turn.to_dict() for turn in turns]
    if tool_format is None:
        ids = tokenizer.apply_chat_template(rows)
    else:
        ids = tool_format.encode(tokenizer, rows, tools)
    if continued:
        ids = ids + tokenizer.encode([continued], parse_special=False)[0]
    return np.array(ids, "int32")


def merge(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Returns messages whose roles alternate, after at most one system message.

    Results of tools are not merged.
    """
    turns: list[ChatMessage] = []
    for message in messages:
        is_first = all(turn.role == "system" for turn in turns)
        role = "user" if message.role == "system" and not is_first else message.role
        if turns and turns[-1].role == role != "tool":
            last = turns[-1]
            text = "\n\n".join(filter(None, [last.text, message.text]))
            turns[-1] = ChatMessage(role, text, last.calls + message.calls)
        else:
            turns.append(dataclasses.replace(message, role=role))
    if turns[0].role == "system" and (len(turns) == 1 or turns[1].role != "user"):
        turns[0].role = "user"
    return turns

"""Tools, calls and results in the format of OpenAI's API: checks and plain types.

Knows nothing about how a model writes them.
"""

import dataclasses
import json
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

from keras_gemma.checks import is_deeper
from keras_gemma.text.chat import Message, check_message, message_text, parts_of

MAX_LEVELS = 100
"""Maximum number of dicts and lists inside each other, in tools and in calls."""

TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
"""Pattern of valid names of tools."""

CHOICES = ("none", "auto", "required")
"""Values of `tool_choice` that are strings."""


@dataclasses.dataclass(frozen=True)
class Tool:
    """Function that a model may call."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    """JSON schema of the arguments, an object."""


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """Call that a model has made."""

    name: str
    arguments: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class TextDelta:
    """Piece of the text of an answer."""

    text: str


@dataclasses.dataclass(frozen=True)
class ToolCallDelta:
    """Piece of a call: `id` and `name` are in the first one, and `arguments` add up."""

    index: int
    """Number of the call in the answer."""
    id: str | None
    name: str | None
    """`None` after the first piece, as the ID."""
    arguments: str
    """Piece of a JSON object."""


Delta = TextDelta | ToolCallDelta


class ToolParser(Protocol):
    """Parser of one answer. Malformed calls are text."""

    def push(self, text: str) -> list[Delta]:
        """Adds text, and returns what is decided now.

        The text has the names of control tokens: `detokenize(ids, skip_special_tokens=False)`.
        """
        ...

    def finish(self) -> list[Delta]:
        """Returns the rest at the end of the answer."""
        ...


@dataclasses.dataclass(frozen=True)
class Step:
    """Message of a conversation with tools, after the system message."""

    role: Literal["user", "model", "tool"]
    text: str
    calls: Sequence[ToolCall] = ()
    """Calls of a model's message, after its text."""
    name: str = ""
    """Name of the tool whose result `text` is."""


def read_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[Tool]:
    """Converts the `tools` of a request.

    Args:
        tools: Dicts `{"type": "function", "function": {"name", "description", "parameters"}}`, or
            with these three keys next to `"type"`.

    Raises:
        ValueError: If a tool is malformed, or two have the same name.
    """
    result: dict[str, Tool] = {}
    for i, tool in enumerate(tools or ()):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or tool.get("type", "function") != "function":
            raise ValueError(
                "`tools` must be dicts {'type': 'function', 'function': ...}. "
                f"Received: tools[{i}]={tool!r:.80}"
            )
        name = function.get("name")
        parameters = function.get("parameters") or {"type": "object", "properties": {}}
        if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
            raise ValueError(
                "The name of a tool must have 1 to 64 letters, digits, dots, underscores and "
                f"hyphens. Received: tools[{i}].function.name={name!r:.80}"
            )
        if name in result:
            raise ValueError(f"The names in `tools` must be unique. Received: two tools {name!r}")
        if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
            raise ValueError(
                "The parameters of a tool must be a JSON schema of type 'object'. "
                f"Received: tools[{i}].function.parameters={parameters!r:.80}"
            )
        place = f"tools[{i}].function.parameters"
        if is_deeper(parameters, MAX_LEVELS):
            raise ValueError(
                f"The parameters of a tool may have at most {MAX_LEVELS} levels. "
                f"Received: {place} with more"
            )
        check_schema(parameters, place)
        result[name] = Tool(name, str(function.get("description") or ""), parameters)
    return list(result.values())


def check_schema(schema: Any, place: str) -> None:
    """Raises a ValueError unless the parts of a JSON schema that tool formats read are well-formed.

    Args:
        schema: The schema.
        place: Its place in the tools, for the message.
    """
    if isinstance(schema, bool):  # any value, or none
        return
    if not isinstance(schema, Mapping):
        raise ValueError(
            f"A JSON schema in `tools` must be a dict. Received: {place}={schema!r:.80}"
        )
    for key, (expected, is_valid) in SCHEMA_KEYS.items():
        if key in schema and not is_valid(schema[key]):
            raise ValueError(
                f"{key!r} in a JSON schema in `tools` must be {expected}. "
                f"Received: {place}.{key}={schema[key]!r:.80}"
            )
    for name, value in schema.get("properties", {}).items():
        check_schema(value, f"{place}.properties.{name}")
    if "items" in schema and not is_list(schema["items"]):
        check_schema(schema["items"], f"{place}.items")


def is_list(value: Any) -> bool:
    """Returns True for the lists of JSON, also if they are tuples."""
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_list_of_strings(value: Any) -> bool:
    return is_list(value) and all(isinstance(item, str) for item in value)


SCHEMA_KEYS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "type": (
        "a string or a list of strings",
        lambda value: isinstance(value, str) or _is_list_of_strings(value),
    ),
    "properties": (
        "a dict whose keys are strings",
        lambda value: isinstance(value, Mapping) and _is_list_of_strings(list(value)),
    ),
    "required": ("a list of strings", _is_list_of_strings),
    "enum": ("a list", is_list),
    "description": ("a string", lambda value: value is None or isinstance(value, str)),
}
"""Expected value of each key, in words and as a function."""


def required_tools(tools: Sequence[Tool], tool_choice: Any) -> list[Tool]:
    """Returns the tools that an answer must call one of. Empty if it may be a text.

    Args:
        tools: Tools of the request.
        tool_choice: `"none"`, `"auto"`, `"required"`, `{"type": "function", "function": {"name":
            ...}}`, or `None`, which means `"auto"`.

    Raises:
        ValueError: If the choice is not one of these, or no tool has this name.
    """
    if tool_choice is None or tool_choice in ("none", "auto"):
        return []
    if tool_choice == "required":
        if not tools:
            raise ValueError("`tool_choice` 'required' needs `tools`. Received: no tools")
        return list(tools)
    name = None
    if isinstance(tool_choice, Mapping):
        function = tool_choice.get("function", tool_choice)
        name = function.get("name") if isinstance(function, Mapping) else None
    if name is None:
        raise ValueError(
            f"`tool_choice` must be one of {', '.join(map(repr, CHOICES))}, or a dict "
            "{'type': 'function', 'function': {'name': ...}}. "
            f"Received: tool_choice={tool_choice!r:.80}"
        )
    chosen = [tool for tool in tools if tool.name == name]
    if not chosen:
        names = ", ".join(repr(tool.name) for tool in tools) or "no tools"
        raise ValueError(f"`tool_choice` must name one of: {names}. Received: {name!r:.80}")
    return chosen


def read_steps(messages: Sequence[Message]) -> tuple[str, list[Step]]:
    """Converts messages, with calls and results, to the system message and steps.

    Args:
        messages: Messages with the roles `"system"` or `"developer"` (the first only), `"user"`,
            `"assistant"` or `"model"`, which may have `"tool_calls"`, and `"tool"`, with a
            `"tool_call_id"` or `"name"`. Content may be `None` in messages with calls.

    Raises:
        TypeError: If a message has another type.
        ValueError: If a message is malformed, or a result belongs to no call.
    """
    system, steps, names = "", [], {}
    for i, message in enumerate(messages):
        if isinstance(message, Mapping) and message.get("content") is None:
            calls = message.get("tool_calls")
            message = {**message, "content": ""} if calls else message
        check_message(i, message)
        role, text = message["role"], message_text(message)
        if role in ("system", "developer") and i == 0:
            system = "".join(parts_of(message["content"]))
        elif role in ("assistant", "model"):
            calls = [_read_call(i, call, names) for call in message.get("tool_calls") or ()]
            steps.append(Step("model", text, calls))
        elif role == "tool":
            name = names.get(message.get("tool_call_id")) or message.get("name")
            if not isinstance(name, str):
                raise ValueError(
                    "A message with the role 'tool' must have the 'tool_call_id' of an earlier "
                    f"call. Received: messages[{i}]={dict(message)!r:.80}"
                )
            steps.append(Step("tool", text, name=name))
        elif role == "user":
            steps.append(Step("user", text))
        else:
            raise ValueError(
                "The role of a message must be 'user', 'assistant' or 'tool', or 'system' in the "
                f"first message. Received: messages[{i}]['role']={role!r:.40}"
            )
    if not steps:
        raise ValueError(
            "`messages` must have at least one user message. "
            f"Received: messages={list(messages)!r:.80}"
        )
    return system, steps


def _read_call(i: int, call: Any, names: dict[Any, str]) -> ToolCall:
    function = call.get("function") if isinstance(call, Mapping) else None
    function = function if isinstance(function, Mapping) else {}
    name, arguments = function.get("name"), function.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = loads(arguments)
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        raise ValueError(
            "A call must be a dict {'id': ..., 'type': 'function', 'function': {'name': ..., "
            "'arguments': ...}}, and its arguments a JSON object. "
            f"Received in messages[{i}]['tool_calls']: {call!r:.80}"
        )
    if isinstance(call.get("id"), str):
        names[call["id"]] = name
    return ToolCall(name, arguments)


def loads(text: str) -> Any:
    """Returns the value of a JSON text, or `None` if it is invalid or has too many levels."""
    try:
        value = json.loads(text, parse_constant=refuse_constant)
    except (ValueError, RecursionError):
        return None
    return None if is_deeper(value, MAX_LEVELS) else value


def refuse_constant(constant: str) -> None:
    """Raises a ValueError for NaN and infinities, which are not JSON."""
    raise ValueError(f"{constant} is not JSON")


def deltas_of(calls: Sequence[ToolCall], first_index: int) -> list[Delta]:
    """Returns whole calls as deltas with new ids.

    Raises:
        ValueError, TypeError: If arguments cannot be written as JSON.
    """
    return [
        ToolCallDelta(
            first_index + i,
            f"call_{uuid.uuid4().hex[:24]}",
            call.name,
            json.dumps(call.arguments, ensure_ascii=False, allow_nan=False),
        )
        for i, call in enumerate(calls)
    ]

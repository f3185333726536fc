"""Tools of FunctionGemma, which has control tokens for them, here without `<` and `>`:

    start_of_turn developer
    {system}  start_function_declaration declaration:{name}{...} end_function_declaration
    end_of_turn
    start_of_turn user
    {question} end_of_turn
    start_of_turn model
    start_function_call call:{name}{city:escape Paris escape} end_function_call
    start_function_response response:{name}{degrees:15} end_function_response {answer} end_of_turn

Results continue the turn of the calls. The format is described at
https://ai.google.dev/gemma/docs/functiongemma/formatting-and-best-practices
"""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from keras_gemma.text.chat import Message
from keras_gemma.text.pieces import Pieces
from keras_gemma.text.stream import longest_overlap
from keras_gemma.text.tokenizer import GemmaTokenizer
from keras_gemma.text.tool_calls import (
    Delta,
    Step,
    TextDelta,
    Tool,
    ToolCall,
    deltas_of,
    is_list,
    loads,
    read_steps,
    required_tools,
)

TRIGGER = "You are a model that can do function calling with the following functions"
"""Text before the definitions, as in training: without it, the model answers with text."""


class Control(str):
    """Name of a control token, in a list of parts of a prompt."""

    __slots__ = ()


BOS, START, END = Control("<bos>"), Control("<start_of_turn>"), Control("<end_of_turn>")
ESCAPE = Control("<escape>")
START_DECLARATION = Control("<start_function_declaration>")
END_DECLARATION = Control("<end_function_declaration>")
START_CALL, END_CALL = Control("<start_function_call>"), Control("<end_function_call>")
START_RESPONSE = Control("<start_function_response>")
END_RESPONSE = Control("<end_function_response>")


class FunctionGemmaToolFormat:
    """Format of the tools of FunctionGemma."""

    name = "functiongemma"

    def encode(
        self, tokenizer: GemmaTokenizer, messages: Sequence[Message], tools: Sequence[Tool] = ()
    ) -> list[int]:
        """Returns the ids of a conversation, up to where the model continues.

        Args:
            messages: Same as in `read_steps`.
            tools: Tools to define in the prompt.

        Raises:
            TypeError: Same as in `read_steps`.
            ValueError: Same as in `read_steps`, and if a call has no result or the vocabulary lacks
                a control token.
        """
        return encode_parts(prompt_parts(*read_steps(messages), tools), tokenizer.pieces)

    def response_format(
        self, tools: Sequence[Tool], tool_choice: Any, parallel: bool = True
    ) -> dict[str, Any] | None:
        """Same as in `Gemma3ToolFormat`."""
        required = required_tools(tools, tool_choice)
        if not required:
            return None
        grammar = call_grammar(required, parallel and tool_choice == "required")
        return {"type": "lark", "grammar": grammar}

    def parser(self, tools: Sequence[Tool]) -> "FunctionGemmaToolParser":
        """Returns a new parser of an answer."""
        return FunctionGemmaToolParser(tools)


def prompt_parts(system: str, steps: Sequence[Step], tools: Sequence[Tool]) -> list[str]:
    """Returns the parts of a prompt. Parts that are not `Control` are plain text."""
    parts: list[str] = [BOS]
    if system or tools:
        if tools and TRIGGER not in system:
            system = "\n\n".join(filter(None, [system.strip(), TRIGGER]))
        parts += [START, "developer\n", system.strip()]
        for tool in tools:
            parts += [START_DECLARATION, *declaration_parts(tool), END_DECLARATION]
        parts += [END, "\n"]
    is_open = is_waiting = False  # the model's turn; for a result
    for step in steps:
        if step.role == "tool":
            result = loads(step.text)
            result = result if isinstance(result, dict) else {"value": step.text}
            parts += [START_RESPONSE, f"response:{step.name}", *value_parts(result), END_RESPONSE]
            is_waiting = False
            continue
        _check_results(is_waiting)
        if is_open and step.role == "user":
            parts += [END, "\n"]
            is_open = False
        parts += [step.text] if is_open else [START, f"{step.role}\n", step.text]
        for call in step.calls:
            parts += [START_CALL, f"call:{call.name}", *value_parts(call.arguments), END_CALL]
        is_open = is_waiting = bool(step.calls)
        if not is_open:
            parts += [END, "\n"]
    _check_results(is_waiting)
    return parts if is_open else [*parts, START, "model\n"]


def _check_results(is_waiting: bool) -> None:
    if is_waiting:
        raise ValueError(
            "`messages` must have a result after each message with calls: a message with the role "
            "'tool'. Received: calls without a result"
        )


def declaration_parts(tool: Tool) -> list[str]:
    """Returns the parts of the definition of a tool."""
    parts = [f"declaration:{tool.name}{{description:", *value_parts(tool.description)]
    if tool.parameters.get("properties"):
        parts += [",parameters:", *schema_parts({"type": "object", **tool.parameters})]
    return [*parts, "}"]


def schema_parts(schema: Mapping[str, Any] | bool) -> list[str]:
    """Returns the parts of a JSON schema: the keywords that FunctionGemma knows, the type last."""
    schema = {} if isinstance(schema, bool) else schema
    kind = schema.get("type", "string")
    kind = next((name for name in kind if name != "null"), "null") if is_list(kind) else kind
    fields: dict[str, list[str]] = {}
    if schema.get("description"):
        fields["description"] = value_parts(schema["description"])
    if schema.get("enum"):
        fields["enum"] = value_parts(schema["enum"])
    if isinstance(schema.get("items"), Mapping):
        fields["items"] = schema_parts(schema["items"])
    if isinstance(schema.get("properties"), Mapping):
        properties = {key: schema_parts(value) for key, value in schema["properties"].items()}
        fields["properties"] = braces(dict(in_order(properties)))
    if schema.get("required"):
        fields["required"] = value_parts(schema["required"])
    return braces({**fields, "type": value_parts(str(kind).upper())})


def value_parts(value: Any) -> list[str]:
    """Returns the parts of a value. Strings are between two `<escape>`."""
    if isinstance(value, str):
        return [ESCAPE, value, ESCAPE]
    if isinstance(value, Mapping):
        return braces({key: value_parts(item) for key, item in in_order(value)})
    if is_list(value):
        return ["[", *joined(map(value_parts, value)), "]"]
    return [json.dumps(value)]


def braces(fields: Mapping[str, list[str]]) -> list[str]:
    """Returns the parts of `{key:value,...}`."""
    return ["{", *joined([f"{key}:", *parts] for key, parts in fields.items()), "}"]


def joined(items: Any) -> list[str]:
    """Returns the parts of all items, separated by commas."""
    parts: list[str] = []
    for item in items:
        parts += [",", *item] if parts else item
    return parts


def in_order(fields: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Returns the fields in the order of the model's chat template: alphabetical."""
    return sorted(fields.items(), key=lambda field: str(field[0]).lower())


def encode_parts(parts: Sequence[str], vocabulary: Pieces) -> list[int]:
    """Returns the ids of parts. Names of control tokens in plain text remain text.

    Raises:
        ValueError: If the vocabulary lacks a control token.
    """
    ids: list[int] = []
    for is_control, group in itertools.groupby(parts, lambda part: isinstance(part, Control)):
        if not is_control:
            ids += vocabulary.encode(["".join(group)], parse_special=False)[0]
            continue
        for name in group:
            if name not in vocabulary.control_tokens:
                raise ValueError(
                    f"The vocabulary has no {name}, which tools of FunctionGemma require. Use its "
                    "vocabulary, or the tool format 'gemma3'."
                )
            ids.append(vocabulary.control_tokens[name])
    return ids


class FunctionGemmaToolParser:
    """Parser of one answer: text and calls in any order."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        self.names = {tool.name for tool in tools}
        self.text = ""  # not decided yet
        self.num_calls = 0

    def push(self, text: str) -> list[Delta]:
        """Adds text. A call is returned when it is complete."""
        self.text += text
        deltas: list[Delta] = []
        while True:
            before, start, call = self.text.partition(START_CALL)
            call, end, after = call.partition(END_CALL)
            if not start:
                length = len(before) - longest_overlap(before, START_CALL)
                before, self.text = before[:length], before[length:]
            elif not end:
                self.text = start + call
            else:
                self.text = after
            deltas += [TextDelta(before)] if before else []
            if not end:
                return deltas
            deltas += self._call(call)

    def finish(self) -> list[Delta]:
        """Returns an incomplete call as text."""
        text, self.text = self.text, ""
        return [TextDelta(text)] if text else []

    def _call(self, text: str) -> list[Delta]:
        try:
            deltas = deltas_of([read_call(text, self.names)], self.num_calls)
        except (ValueError, RecursionError):
            return [TextDelta(f"{START_CALL}{text}{END_CALL}")]
        self.num_calls += 1
        return deltas


def read_call(text: str, names: set[str]) -> ToolCall:
    """Returns the call of `call:name{key:value,...}`.

    Raises:
        ValueError: If the call is malformed, or the name is not one of `names`.
    """
    head = re.match(r"\s*call:([^{\s]*)\s*(?=\{)", text)
    if head is None or head[1] not in names:
        raise ValueError("not a call")
    reader = _Reader(text, head.end())
    arguments = reader.value()
    if text[reader.position :].strip():
        raise ValueError("text after the arguments")
    return ToolCall(head[1], arguments)


class _Reader:
    """Reader of values, from a position in a text on."""

    def __init__(self, text: str, position: int) -> None:
        self.text = text
        self.position = position

    def take(self, pattern: str) -> str | None:
        """Returns the text that matches at the position, and moves behind it and white space."""
        match = re.compile(pattern, re.DOTALL).match(self.text, self.position)
        if match is None:
            return None
        self.position = re.compile(r"\s*").match(self.text, match.end()).end()
        return match[0]

    def value(self) -> Any:
        string = self.take(f"{ESCAPE}.*?{ESCAPE}")
        if string is not None:
            return string[len(ESCAPE) : -len(ESCAPE)]
        if self.take(r"\{"):
            return dict(self.items(self.pair, r"\}"))
        if self.take(r"\["):
            return self.items(self.value, r"\]")
        word = (self.take(r"[^,{}\[\]<]+") or "").strip()
        value = loads(word)
        if not word or isinstance(value, str) or (value is None and word != "null"):
            raise ValueError("not a value")
        return value

    def pair(self) -> tuple[str, Any]:
        key = self.take(r"[^:,{}<]+(?=:)|<escape>.*?<escape>(?=:)")
        if key is None or not self.take(":"):
            raise ValueError("not a key")
        return key.removeprefix(ESCAPE).removesuffix(ESCAPE).strip(), self.value()

    def items(self, read: Any, end: str) -> list[Any]:
        items: list[Any] = []
        while not self.take(end):
            if items and not self.take(","):
                raise ValueError("not a comma")
            items.append(read())
        return items


def call_grammar(tools: Sequence[Tool], parallel: bool) -> str:
    """Returns the Lark grammar of a call of one of `tools`, or of several calls if `parallel`."""
    rules = _Rules()
    calls = " | ".join(
        rules.add(f"{rules.quote(f'call:{tool.name}')} {rules.object(tool.parameters)}")
        for tool in tools
    )
    call = rules.add(f"{START_CALL} ({calls}) {END_CALL}")
    return "\n".join([f"start: {call}{'+' if parallel else ''}", *rules.lines])


class _Rules:
    """Lark rules of values, from JSON schemas. Keywords of ranges and patterns are ignored."""

    def __init__(self) -> None:
        self.lines = [
            f"any: string | NUMBER | {self.options(['true', 'false', 'null'])} | list | dict",
            'list: "[" (any ("," any)*)? "]"',
            'dict: "{" (pair ("," pair)*)? "}"',
            'pair: KEY ":" any',
            f"string: {ESCAPE} TEXT? {ESCAPE}",
            "TEXT: /(?s:.+)/",
            "KEY: /[A-Za-z_][A-Za-z0-9_]*/",
            r"NUMBER: /-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?/",
            "INTEGER: /-?(0|[1-9][0-9]*)/",
        ]

    def add(self, body: str) -> str:
        """Adds a rule, and returns its name."""
        name = f"rule{len(self.lines)}"
        self.lines.append(f"{name}: {body}")
        return name

    def quote(self, text: str) -> str:
        return json.dumps(text)

    def options(self, texts: Sequence[str]) -> str:
        return "(" + " | ".join(map(self.quote, texts)) + ")"

    def value(self, schema: Any) -> str:
        """Returns an expression of the values of a schema."""
        if not isinstance(schema, Mapping):
            return "any"
        values = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if values:
            return "(" + " | ".join(map(self.literal, values)) + ")"
        kind = schema.get("type")
        if is_list(kind):
            return "(" + " | ".join(self.value({**schema, "type": name}) for name in kind) + ")"
        if kind == "array":
            item = self.value(schema.get("items"))
            return self.add(f'"[" ({item} ("," {item})*)? "]"')
        if kind == "object":
            return self.object(schema)
        simple = {
            "string": "string",
            "integer": "INTEGER",
            "number": "NUMBER",
            "boolean": self.options(["true", "false"]),
            "null": self.quote("null"),
        }
        return simple.get(kind, "any")

    def literal(self, value: Any) -> str:
        parts = value_parts(value)
        return " ".join(
            part if isinstance(part, Control) else self.quote(part) for part in parts if part
        )

    def object(self, schema: Mapping[str, Any]) -> str:
        """Returns the rule of an object: its properties in order, without the optional ones."""
        properties = schema.get("properties")
        if not properties:
            return self.add('"{" "}"') if "properties" in schema else "dict"
        required = schema.get("required", ())
        # Rules of the rest after each property, if a property precedes it (True) or not.
        rest = {True: '""', False: '""'}
        for key, value in reversed(in_order(properties)):
            pair = self.add(f"{self.quote(f'{key}:')} {self.value(value)}")
            present = {True: f'"," {pair} {rest[True]}', False: f"{pair} {rest[True]}"}
            absent = {} if key in required else rest
            rest = {
                comma: self.add(" | ".join(filter(None, [present[comma], absent.get(comma)])))
                for comma in (True, False)
            }
        return self.add(f'"{{" {rest[False]} "}}"')

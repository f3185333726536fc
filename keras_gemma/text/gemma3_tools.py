"""Tools of Gemma 3, which has no control tokens for them: definitions and calls are JSON.

    user:   {system}  {tool definitions}  {question}
    model:  {"name":"weather","parameters":{"city":"Paris"}}
    user:   {results}
    model:  {answer}

Calls are read in Python's syntax too: `[weather(city="Paris")]`. Both may be inside a code block.
"""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from keras_gemma.text.chat import Message
from keras_gemma.text.tokenizer import GemmaTokenizer
from keras_gemma.text.tool_calls import (
    Delta,
    TextDelta,
    Tool,
    ToolCall,
    deltas_of,
    loads,
    read_steps,
    refuse_constant,
    required_tools,
)

INSTRUCTIONS = (
    "You can call the functions below. To call a function, answer with a JSON object "
    '{"name": name of the function, "parameters": arguments by name} and no other text. To call '
    "several functions, answer with a list of such objects. If no function is needed, answer "
    "with text.\n"
)
"""Text before the definitions in the prompt."""

RESULTS = "Results of the functions:\n"
"""Text before the results in the prompt, one JSON object per line."""

FENCE = re.compile(r"```[a-z_]*\s*")
"""Beginning of a code block."""


class Gemma3ToolFormat:
    """Format of the tools of Gemma 3, and of other models without control tokens for tools."""

    name = "gemma3"

    def encode(
        self, tokenizer: GemmaTokenizer, messages: Sequence[Message], tools: Sequence[Tool] = ()
    ) -> list[int]:
        """Returns the ids of a conversation, with the beginning of the model's turn.

        Args:
            messages: Same as in `read_steps`.
            tools: Tools to define in the prompt.

        Raises:
            TypeError, ValueError: Same as in `read_steps` and `apply_chat_template`.
        """
        return tokenizer.apply_chat_template(self.messages(messages, tools))

    def messages(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[Message]:
        """Returns messages with tools, calls and results as text. Messages of one role that follow
        each other are joined."""
        system, steps = read_steps(messages)
        system = "\n\n".join(filter(None, [system, self.system_text(tools)]))
        rows: list[tuple[str, str]] = []
        for i, step in enumerate(steps):
            role, text = "assistant" if step.role == "model" else "user", step.text
            if step.role == "tool":
                text = _compact({"name": step.name, "result": step.text})
                is_first = i == 0 or steps[i - 1].role != "tool"
                text = RESULTS + text if is_first else text
            elif step.calls:
                text = "\n".join(filter(None, [text, self.calls_text(step.calls)]))
            if rows and rows[-1][0] == role:
                separator = "\n" if step.role == "tool" else "\n\n"
                text = f"{rows.pop()[1]}{separator}{text}"
            rows.append((role, text))
        plain: list[Message] = [{"role": role, "content": text} for role, text in rows]
        return [{"role": "system", "content": system}, *plain] if system else plain

    def system_text(self, tools: Sequence[Tool]) -> str:
        """Returns the definitions of tools, with instructions. Empty without tools."""
        if not tools:
            return ""
        names = ("name", "description", "parameters")
        return INSTRUCTIONS + json.dumps(
            [{name: getattr(tool, name) for name in names} for tool in tools], ensure_ascii=False
        )

    def calls_text(self, calls: Sequence[ToolCall]) -> str:
        """Returns calls as the model writes them."""
        rows = [{"name": call.name, "parameters": call.arguments} for call in calls]
        return _compact(rows if len(rows) > 1 else rows[0])

    def response_format(
        self, tools: Sequence[Tool], tool_choice: Any, parallel: bool = True
    ) -> dict[str, Any] | None:
        """Returns the response format of an answer that must be a call, otherwise `None`.

        Args:
            tools, tool_choice: Same as in `required_tools`.
            parallel: If True, `"required"` allows several calls.
        """
        required = required_tools(tools, tool_choice)
        if not required:
            return None
        calls = [
            {
                "type": "object",
                "properties": {"name": {"const": tool.name}, "parameters": _schema(tool)},
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
            for tool in required
        ]
        schema: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
        if parallel and tool_choice == "required":
            schema = {"anyOf": [schema, {"type": "array", "items": schema, "minItems": 1}]}
        envelope = {"name": "tool_calls", "schema": schema, "strict": False}
        return {"type": "json_schema", "json_schema": envelope}

    def parser(self, tools: Sequence[Tool]) -> "Gemma3ToolParser":
        """Returns a new parser of an answer."""
        return Gemma3ToolParser(tools)


class Gemma3ToolParser:
    """Parser of one answer: a text, or calls that nothing but white space precedes."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        self.tools = {tool.name: tool for tool in tools}
        self.is_text = False  # True if the answer is not a call
        self.text = ""  # not decided yet
        starts = ['{"name"', *(f"{name}(" for name in self.tools)]
        self.starts = starts + [f"[{start}" for start in starts]

    def push(self, text: str) -> list[Delta]:
        """Adds text. Text that may be a call is withheld until `finish`."""
        self.text += text
        if not self.is_text and self._may_be_call():
            return []
        self.is_text = True
        return self._flush()

    def finish(self) -> list[Delta]:
        """Returns the calls, or the text if they are malformed."""
        if self.is_text:
            return []
        try:
            calls, rest = self._parse()
            deltas = deltas_of(calls, 0)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            return self._flush()
        self.text = rest.strip()
        return [*deltas, *self._flush()]

    def _flush(self) -> list[Delta]:
        text, self.text = self.text, ""
        return [TextDelta(text)] if text else []

    def _may_be_call(self) -> bool:
        text = self.text.lstrip()[:200]
        if text.startswith("`") and "\n" not in text:
            return FENCE.fullmatch(text) is not None or "```".startswith(text)
        fence = FENCE.match(text)
        start = "".join(text[fence.end() if fence else 0 :].split())
        return any(start.startswith(call) or call.startswith(start) for call in self.starts)

    def _parse(self) -> tuple[list[ToolCall], str]:
        """Returns the calls, and the text after them."""
        body, rest = self.text.strip(), ""
        fence = FENCE.match(body)
        if fence:
            body, _, rest = body[fence.end() :].partition("```")
        if re.match(r"\[?\s*\{", body) is None:
            return self._parse_python(body), rest
        decoder, calls = json.JSONDecoder(parse_constant=refuse_constant), []
        while body.startswith(("{", "[")):
            value, end = decoder.raw_decode(body)
            calls += [self._call(item) for item in (value if isinstance(value, list) else [value])]
            body = body[end:].lstrip(" \n\t\r,;")
        if not calls:
            raise ValueError("no calls")
        return calls, body + rest

    def _call(self, item: Any) -> ToolCall:
        if not isinstance(item, Mapping):
            raise ValueError("not an object")
        arguments = item.get("parameters", item.get("arguments", {}))
        if isinstance(arguments, str):
            arguments = loads(arguments)
        if item.get("name") not in self.tools or not isinstance(arguments, Mapping):
            raise ValueError("not a call")
        return ToolCall(item["name"], arguments)

    def _parse_python(self, body: str) -> list[ToolCall]:
        """Returns the calls of `[f(a=1), g("x")]` or `f(a=1)`."""
        node = ast.parse(body.strip(), mode="eval").body
        calls = []
        for call in node.elts if isinstance(node, ast.List) else [node]:
            if not isinstance(call, ast.Call):
                raise ValueError("not a call")
            tool = self.tools.get(ast.unparse(call.func))
            if tool is None:
                raise ValueError("unknown function")
            names = list(tool.parameters.get("properties", ()))
            arguments = {
                name: ast.literal_eval(value) for name, value in zip(names, call.args, strict=False)
            }
            if len(arguments) < len(call.args):
                raise ValueError("too many arguments")
            for keyword in call.keywords:
                if keyword.arg is None:
                    raise ValueError("unnamed arguments")
                arguments[keyword.arg] = ast.literal_eval(keyword.value)
            calls.append(ToolCall(tool.name, arguments))
        if not calls:
            raise ValueError("no calls")
        return calls


def _schema(tool: Tool) -> dict[str, Any]:
    """Returns the schema of a tool's arguments, as a part of another schema."""
    defaults = {"$id": f"tool:///{tool.name}", "type": "object", "additionalProperties": False}
    return defaults | {**tool.parameters}


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))

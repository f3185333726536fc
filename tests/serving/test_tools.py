"""Tools and response formats, with replacements for the formats of the models."""

import concurrent.futures
import json
import threading

import pytest

from keras_gemma.serving import chat_generation
from keras_gemma.serving.service import MAX_COMPILING
from keras_gemma.text.grammar import GrammarCompiler
from keras_gemma.text.tool_calls import TextDelta, ToolCallDelta
from tests.serving.sse import chunks, events

pytestmark = pytest.mark.once

USER = {"role": "user", "content": "Weather?"}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"name": "weather", "description": "Tells it.", "parameters": PARAMETERS}
OPENAI = {"messages": [USER], "tools": [{"type": "function", "function": TOOL}]}
ANTHROPIC = {
    "messages": [USER],
    "max_tokens": 100,
    "tools": [{"name": "weather", "description": "Tells it.", "input_schema": PARAMETERS}],
}
RESPONSES = {"input": "Weather?", "tools": [{"type": "function", **TOOL}]}
ARGUMENTS = '{"city": "Paris"}'


class FakeFormat:
    """A format whose answers are `text|name|arguments|name|arguments`."""

    def __init__(self):
        self.messages, self.choice = None, None

    def encode(self, tokenizer, messages, tools):
        self.messages, self.tools = messages, tools
        return tokenizer.encode(["to" + "ol" * len(tools)])[0]

    def response_format(self, tools, tool_choice, parallel=True):
        self.choice, self.parallel = tool_choice, parallel
        return {"type": "regex", "regex": "a"} if tool_choice == "required" else None

    def parser(self, tools):
        return FakeParser()


class FakeParser:
    def __init__(self):
        self.text, self.is_text = "", True

    def push(self, text):
        before, bar, after = text.partition("|")
        if self.is_text and not bar:
            return [TextDelta(text)]
        self.text += after if self.is_text else text
        self.is_text = False
        return [TextDelta(before)] if bar and before and before != text else []

    def finish(self):
        if self.is_text:
            return []
        words = self.text.split("|")
        deltas = []
        for index, (name, arguments) in enumerate(zip(words[::2], words[1::2], strict=True)):
            half = len(arguments) // 2
            deltas += [
                call_piece(index, name, arguments[:half]),
                call_piece(index, None, arguments[half:]),
            ]
        return deltas


def call_piece(index, name, arguments):
    id = f"call_{index}"
    return ToolCallDelta(index, id, name, arguments)


@pytest.fixture
def tool_format(monkeypatch):
    tool_format = FakeFormat()
    monkeypatch.setattr(chat_generation, "tool_format_of", lambda tokenizer: tool_format)
    read_tools = lambda tools: [tool["function"] for tool in tools]  # noqa: E731
    monkeypatch.setattr(chat_generation, "read_tools", read_tools)
    return tool_format


@pytest.fixture
def formats(monkeypatch):
    """Response formats that were compiled. Each gives a constraint of its own."""
    compiled = []

    def compile_format(compiler, response_format):
        compiled.append(response_format)
        if response_format.get("regex") == "(":
            raise ValueError("`response_format` has an invalid regex.")
        return lambda: None

    monkeypatch.setattr(GrammarCompiler, "compile", compile_format)
    return compiled


def post(client, path, body):
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response


def test_openai_calls(client, engine, tool_format):
    engine.text = f"Let me see.|weather|{ARGUMENTS}|weather|{{}}"
    body = OPENAI | {"parallel_tool_calls": False}
    (choice,) = post(client, "/v1/chat/completions", body).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me see."
    first, second = choice["message"]["tool_calls"]
    assert first == {
        "id": "call_0",
        "type": "function",
        "function": {"name": "weather", "arguments": ARGUMENTS},
    }
    assert second["id"] == "call_1" and second["function"]["arguments"] == "{}"
    assert tool_format.tools == [TOOL]
    assert (tool_format.choice, tool_format.parallel) == ("auto", False)
    items = chunks(post(client, "/v1/chat/completions", OPENAI | {"stream": True}))
    deltas = [item["choices"][0]["delta"] for item in items]
    pieces = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert [piece["index"] for piece in pieces] == [0, 0, 1, 1]
    assert pieces[0]["id"] == "call_0" and pieces[0]["function"]["name"] == "weather"
    assert "id" not in pieces[1]
    assert "".join(p["function"]["arguments"] for p in pieces[:2]) == ARGUMENTS
    assert items[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_openai_text_in_spite_of_tools(client, tool_format):
    (choice,) = post(client, "/v1/chat/completions", OPENAI).json()["choices"]
    assert choice["finish_reason"] == "stop" and "tool_calls" not in choice["message"]
    assert choice["message"]["content"] == "Hello there, world!"


def test_no_tools_are_shown_if_none_may_be_called(client, engine, tool_format):
    post(client, "/v1/chat/completions", OPENAI | {"tool_choice": "none"})
    assert tool_format.messages is None
    assert engine.requests[0].prompt.tolist() == engine.tokenizer.apply_chat_template([USER])


def test_required_calls_are_constrained(client, engine, tool_format, formats):
    post(client, "/v1/chat/completions", OPENAI | {"tool_choice": "required"})
    assert formats == [{"type": "regex", "regex": "a"}]
    assert engine.requests[0].constraint is not None


def test_conversations_with_results(client, tool_format):
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
    expected = [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "Sun", "tool_call_id": "c1"},
        {"role": "tool", "content": "Rain", "tool_call_id": "c2"},
    ]
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "Sun", "tool_call_id": "c1"},
        {"role": "tool", "content": [{"type": "text", "text": "Rain"}], "tool_call_id": "c2"},
    ]
    post(client, "/v1/chat/completions", {"messages": messages})
    assert tool_format.messages == expected
    use = {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Paris"}}
    results = [
        {"type": "tool_result", "tool_use_id": "c1", "content": "Sun"},
        {
            "type": "tool_result",
            "tool_use_id": "c2",
            "content": [{"type": "text", "text": "Rain"}],
        },
    ]
    messages = [USER, {"role": "assistant", "content": [use]}, {"role": "user", "content": results}]
    post(client, "/v1/messages", ANTHROPIC | {"messages": messages})
    assert tool_format.messages == expected
    items = [
        USER,
        {"type": "reasoning", "summary": []},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": ARGUMENTS},
        {"type": "function_call_output", "call_id": "c1", "output": "Sun"},
        {"type": "function_call_output", "call_id": "c2", "output": "Rain"},
    ]
    post(client, "/v1/responses", {"input": items})
    assert tool_format.messages == expected


def test_anthropic_calls(client, engine, tool_format):
    engine.text = f"Let me see.|weather|{ARGUMENTS}"
    answer = post(client, "/v1/messages", ANTHROPIC).json()
    use = {"type": "tool_use", "id": "call_0", "name": "weather", "input": {"city": "Paris"}}
    assert answer["content"] == [{"type": "text", "text": "Let me see."}, use]
    assert answer["stop_reason"] == "tool_use"
    items = events(post(client, "/v1/messages", ANTHROPIC | {"stream": True}))
    assert all(name == data["type"] for name, data in items)
    starts = [data for name, data in items if name == "content_block_start"]
    assert [(s["index"], s["content_block"]["type"]) for s in starts] == [
        (0, "text"),
        (1, "tool_use"),
    ]
    assert starts[1]["content_block"]["input"] == {}
    stops = [data["index"] for name, data in items if name == "content_block_stop"]
    assert stops == [0, 1]
    deltas = [data["delta"] for name, data in items if name == "content_block_delta"]
    assert "".join(delta.get("partial_json", "") for delta in deltas) == ARGUMENTS
    assert items[-2][1]["delta"]["stop_reason"] == "tool_use"
    count = post(client, "/v1/messages/count_tokens", ANTHROPIC).json()["input_tokens"]
    assert count == answer["usage"]["input_tokens"]


def test_responses_calls(client, engine, tool_format):
    engine.text = f"Let me see.|weather|{ARGUMENTS}"
    text, call = post(client, "/v1/responses", RESPONSES).json()["output"]
    assert text["content"][0]["text"] == "Let me see."
    assert (call["type"], call["name"], call["call_id"]) == ("function_call", "weather", "call_0")
    assert json.loads(call["arguments"]) == {"city": "Paris"}
    items = events(post(client, "/v1/responses", RESPONSES | {"stream": True}))
    names = [name.removeprefix("response.") for name, _ in items]
    assert names[-6:] == [
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    assert [item["type"] for item in items[-1][1]["response"]["output"]] == [
        "message",
        "function_call",
    ]
    only_call = f"|weather|{ARGUMENTS}"
    engine.text = only_call
    answer = post(client, "/v1/responses", RESPONSES).json()
    assert [item["type"] for item in answer["output"]] == ["function_call"]


SCHEMA = {"type": "object"}


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        (
            "/v1/chat/completions",
            {"messages": [USER], "response_format": {"type": "json_object"}},
            {"type": "json_object"},
        ),
        (
            "/v1/chat/completions",
            {
                "messages": [USER],
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": SCHEMA, "strict": True},
                },
            },
            {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}},
        ),
        (
            "/v1/completions",
            {"prompt": "a", "response_format": {"type": "choice", "choices": ["a"]}},
            {"type": "choice", "choices": ["a"]},
        ),
        (
            "/v1/responses",
            {
                "input": "a",
                "text": {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}},
            },
            {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}},
        ),
        (
            "/generate",
            {"inputs": "a", "parameters": {"grammar": {"type": "regex", "value": "a+"}}},
            {"type": "regex", "regex": "a+"},
        ),
        (
            "/generate",
            {"inputs": "a", "parameters": {"grammar": {"type": "json", "value": SCHEMA}}},
            {"type": "json_schema", "json_schema": {"name": "grammar", "schema": SCHEMA}},
        ),
    ],
)
def test_response_formats(client, engine, formats, path, body, expected):
    post(client, path, body)
    assert formats == [expected]
    assert engine.requests[0].constraint() is None  # the fake's


def test_text_is_not_constrained(client, engine, formats):
    post(client, "/v1/chat/completions", {"messages": [USER], "response_format": {"type": "text"}})
    assert formats == [] and engine.requests[0].constraint is None


def test_an_invalid_grammar(client, engine, formats):
    wrong = {"type": "regex", "regex": "("}
    for path, body in (
        ("/v1/chat/completions", {"messages": [USER], "response_format": wrong}),
        ("/v1/completions", {"prompt": "a", "response_format": wrong}),
    ):
        response = client.post(path, json=body)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "response_format"
    assert engine.requests == []


def test_the_format_of_gemma3(client, engine):
    """No replacements: the definitions in the prompt, and a call as the model writes it."""
    engine.max_length = 2000
    engine.text = '{"name": "weather", "parameters": {"city": "Paris"}}'
    body = OPENAI | {"tool_choice": "required"}
    (choice,) = post(client, "/v1/chat/completions", body).json()["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "weather" and call["id"].startswith("call_")
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    prompt = engine.tokenizer.detokenize(engine.requests[0].prompt)
    assert "Tells it." in prompt and "Weather?" in prompt
    assert engine.requests[0].constraint().allowed().any()
    messages = [
        USER,
        choice["message"],
        {"role": "tool", "tool_call_id": call["id"], "content": "Sun"},
    ]
    post(client, "/v1/chat/completions", OPENAI | {"messages": messages})
    assert "Sun" in engine.tokenizer.detokenize(engine.requests[1].prompt)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [USER], "response_format": {"type": "json_object"}}),
        ("/v1/chat/completions", OPENAI | {"tool_choice": "required"}),
        ("/v1/completions", {"prompt": "a", "response_format": {"type": "json_object"}}),
    ],
)
def test_a_constrained_text_that_could_not_end(client, engine, formats, tool_format, path, body):
    response = client.post(path, json=body | {"ignore_eos": True})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == "ignore_eos" and "Leave `ignore_eos` out" in error["message"]
    assert engine.requests == []
    post(client, path, body | {"stop_token_ids": [7]})  # in addition to those of the model


def test_response_formats_are_compiled_on_few_threads(client, engine, monkeypatch):
    """Requests without one are answered meanwhile."""
    running, most, can_end = set(), [], threading.Event()

    def compile_format(compiler, response_format):
        running.add(threading.get_ident())
        most.append(len(running))
        can_end.wait(10)
        running.remove(threading.get_ident())
        return lambda: None

    monkeypatch.setattr(GrammarCompiler, "compile", compile_format)
    engine.max_queued_requests = 10
    body = {"messages": [USER], "response_format": {"type": "json_object"}}
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(post, client, "/v1/chat/completions", body) for _ in range(6)]
        post(client, "/v1/chat/completions", {"messages": [USER]})
        can_end.set()
        for answer in answers:
            answer.result()
    assert max(most) <= MAX_COMPILING


@pytest.mark.parametrize(
    "response_format",
    [
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": 3},
        {"type": "json_schema", "json_schema": {"name": "a"}},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": 3}},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "x"}}},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": ["\ud800"]}}},
        {"type": "regex"},
        {"type": "regex", "regex": 3},
        {"type": "regex", "regex": "("},
        {"type": "regex", "regex": "\ud800"},
        {"type": "lark", "grammar": "start: foo"},
        {"type": "choice", "choices": []},
        {"type": "choice", "choices": [3]},
    ],
)
def test_wrong_response_formats(client, engine, response_format):
    body = json.dumps({"messages": [USER], "response_format": response_format})
    headers = {"Content-Type": "application/json"}
    response = client.post("/v1/chat/completions", content=body, headers=headers)
    assert response.status_code == 400, response.text
    assert engine.requests == []


@pytest.mark.parametrize(
    "change",
    [
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        {"tools": [OPENAI["tools"][0]] * 2},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "x"}}}]},
        {"messages": [USER, {"role": "tool", "tool_call_id": "unknown", "content": "a"}]},
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "f", "arguments": "["}}],
                },
            ]
        },
    ],
)
def test_wrong_tools(client, engine, change):
    response = client.post("/v1/chat/completions", json=OPENAI | change)
    assert response.status_code == 400, response.text
    assert engine.requests == []

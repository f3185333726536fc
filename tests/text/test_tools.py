"""Definitions, calls and results, in prompts, answers and grammars."""

import json
import random

import numpy as np
import pytest

from keras_gemma.text import GemmaTokenizer, train_vocabulary
from keras_gemma.text.function_gemma import FunctionGemmaToolFormat
from keras_gemma.text.gemma3_tools import Gemma3ToolFormat
from keras_gemma.text.grammar import GrammarCompiler
from keras_gemma.text.tool_calls import TextDelta, ToolCallDelta, read_tools
from keras_gemma.text.tools import TOOL_FORMATS, tool_format_of
from tests.text.texts import CORPUS

CONTROLS = [
    f"<{end}_function_{kind}>"
    for kind in ("declaration", "call", "response")
    for end in ("start", "end")
]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_current_weather",
        "description": "Gets the current weather in a given location.",
        "parameters": {
            "type": "object",
            "properties": {
                "location": {
                    "type": "string",
                    "description": 'The city and state, e.g. "San Francisco, CA" or "Tokyo, JP"',
                },
                "unit": {
                    "type": "string",
                    "enum": ["celsius", "fahrenheit"],
                    "description": "The unit to return the temperature in.",
                },
            },
            "required": ["location"],
        },
    },
}
"""The function of FunctionGemma's documentation."""
ADD = {
    "type": "function",
    "name": "add",
    "parameters": {
        "type": "object",
        "properties": {
            "numbers": {"type": "array", "items": {"$ref": "#/$defs/n"}, "maxItems": 3},
            "exact": {"type": "boolean"},
        },
        "required": ["numbers"],
        "$defs": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
TOOLS = read_tools([WEATHER, ADD, NOW])

QUESTION = {"role": "user", "content": "Hey, what's the weather in Tokyo right now?"}
CALLS = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {
            "id": "call_1",
            "type": "function",
            "function": {
                "name": "get_current_weather",
                "arguments": '{"location": "Tokyo, Japan"}',
            },
        }
    ],
}
RESULT = {
    "role": "tool",
    "tool_call_id": "call_1",
    "content": '{"temperature": 15, "weather": "sunny"}',
}
ANSWER = {
    "role": "assistant",
    "content": "The current weather in Tokyo is sunny with a temperature of 15 degrees Celsius.",
}

# ai.google.dev/gemma/docs/functiongemma: formatting-and-best-practices (the declaration), and
# full-function-calling-sequence-with-functiongemma (the rest).
PUBLISHED = (
    "<bos><start_of_turn>developer\n"
    "You are a model that can do function calling with the following functions"
    "<start_function_declaration>declaration:get_current_weather{"
    "description:<escape>Gets the current weather in a given location.<escape>,"
    "parameters:{properties:{location:{description:<escape>The city and state, "
    'e.g. "San Francisco, CA" or "Tokyo, JP"<escape>,type:<escape>STRING<escape>},'
    "unit:{description:<escape>The unit to return the temperature in.<escape>,"
    "enum:[<escape>celsius<escape>,<escape>fahrenheit<escape>],type:<escape>STRING<escape>}},"
    "required:[<escape>location<escape>],type:<escape>OBJECT<escape>}}"
    "<end_function_declaration><end_of_turn>\n"
    "<start_of_turn>user\n"
    "Hey, what's the weather in Tokyo right now?<end_of_turn>\n"
    "<start_of_turn>model\n"
    "<start_function_call>call:get_current_weather{location:<escape>Tokyo, Japan<escape>}"
    "<end_function_call><start_function_response>response:get_current_weather{"
    "temperature:15,weather:<escape>sunny<escape>}<end_function_response>"
    "The current weather in Tokyo is sunny with a temperature of 15 degrees Celsius."
    "<end_of_turn>\n"
)


@pytest.fixture(scope="module")
def tokenizers():
    """Tokenizers with and without FunctionGemma's control tokens, by format."""
    text = [*CORPUS, "0123456789{}[]():,_\"'<>/.-"]
    proto = train_vocabulary(text, 450, words=[*CONTROLS, "<escape>"])
    return {
        "functiongemma": GemmaTokenizer(proto),
        "gemma3": GemmaTokenizer(train_vocabulary(text, 450)),
    }


def prompt(tokenizers, name, messages, tools=TOOLS):
    tokenizer = tokenizers[name]
    ids = tool_format_of(tokenizer).encode(tokenizer, messages, tools)
    return tokenizer.detokenize(ids, skip_special_tokens=False)


def parse(parser, text, size=None):
    """Returns the text and the calls of an answer, pushed in pieces of `size` characters."""
    size = size or len(text) or 1
    deltas = []
    for start in range(0, len(text), size):
        deltas += parser.push(text[start : start + size])
    deltas += parser.finish()
    calls = [delta for delta in deltas if isinstance(delta, ToolCallDelta)]
    assert [call.index for call in calls] == list(range(len(calls)))
    assert len({call.id for call in calls}) == len(calls)
    assert all(call.id.startswith("call_") for call in calls)
    content = "".join(delta.text for delta in deltas if isinstance(delta, TextDelta))
    return content, [(call.name, json.loads(call.arguments)) for call in calls]


def test_formats_by_vocabulary(tokenizers):
    for name, tokenizer in tokenizers.items():
        assert tool_format_of(tokenizer).name == name
        assert tool_format_of(tokenizer, "gemma3").name == "gemma3"
    with pytest.raises(ValueError, match="`tool_format` must be one of 'gemma3', 'functiongemma'"):
        tool_format_of(tokenizers["gemma3"], "xml")


# FunctionGemma


def test_function_gemma_prompt_is_the_published_one(tokenizers):
    messages = [QUESTION, CALLS, RESULT, ANSWER]
    expected = PUBLISHED + "<start_of_turn>model\n"
    assert prompt(tokenizers, "functiongemma", messages, TOOLS[:1]) == expected
    # Before the answer, the model continues its turn.
    cut = PUBLISHED.index("<end_function_response>") + len("<end_function_response>")
    assert prompt(tokenizers, "functiongemma", messages[:3], TOOLS[:1]) == PUBLISHED[:cut]
    developer = {"role": "developer", "content": PUBLISHED.split("\n")[1].split("<")[0]}
    assert prompt(tokenizers, "functiongemma", [developer, *messages], TOOLS[:1]) == expected


def test_function_gemma_values_and_turns(tokenizers):
    call = {"name": "now", "arguments": {"b": [1.5, True, None], "a": {"x": "<end_of_turn>"}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        QUESTION,
        {"role": "assistant", "content": "Well.", "tool_calls": [{"function": call}] * 2},
        {"role": "tool", "name": "now", "content": "noon"},
        {"role": "tool", "name": "now", "content": [{"type": "text", "text": "[1]"}]},
        {"role": "user", "content": "And?"},
    ]
    text = prompt(tokenizers, "functiongemma", messages, TOOLS[2:])
    call_text = (
        "<start_function_call>call:now{a:{x:<escape><end_of_turn><escape>},b:[1.5,true,null]}"
        "<end_function_call>"
    )
    assert text == (
        "<bos><start_of_turn>developer\nBe brief.\n\nYou are a model that can do function calling "
        "with the following functions<start_function_declaration>declaration:now{description:"
        "<escape><escape>}<end_function_declaration><end_of_turn>\n<start_of_turn>user\n"
        f"{QUESTION['content']}<end_of_turn>\n<start_of_turn>model\nWell.{call_text}{call_text}"
        "<start_function_response>response:now{value:<escape>noon<escape>}<end_function_response>"
        "<start_function_response>response:now{value:<escape>[1]<escape>}<end_function_response>"
        "<end_of_turn>\n<start_of_turn>user\nAnd?<end_of_turn>\n<start_of_turn>model\n"
    )
    tokenizer = tokenizers["functiongemma"]
    ids = tool_format_of(tokenizer).encode(tokenizer, messages, TOOLS[2:])
    # The one in the arguments is plain text.
    assert ids.count(tokenizer.end_of_turn_token_id) == text.count("<end_of_turn>") - 2
    plain = prompt(tokenizers, "functiongemma", [QUESTION], ())
    assert plain == tokenizer.apply_chat_template([QUESTION], tokenize=False)


CALL = "<start_function_call>call:{}<end_function_call>"


@pytest.mark.parametrize("size", [None, 1, 7])
@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("Hello <b>, 1 < 2 <start_fun", "Hello <b>, 1 < 2 <start_fun", []),
        (
            CALL.format("add{a:<escape>a}, b<escape>,unit:<escape><escape>}"),
            "",
            [("add", {"a": "a}, b", "unit": ""})],
        ),
        (
            f"So: {CALL.format('add{numbers:[1,-2.5e3],exact:true}')} {CALL.format('now{}')}",
            "So:  ",
            [("add", {"numbers": [1, -2500.0], "exact": True}), ("now", {})],
        ),
        (
            CALL.format("add{ numbers: [ {<escape>k<escape>:null} ] , x:{y:1} }"),
            "",
            [("add", {"numbers": [{"k": None}], "x": {"y": 1}})],
        ),
        *[
            (CALL.format(bad), CALL.format(bad), [])
            for bad in (
                "",
                "other{}",
                "add",
                "add{",
                "add{a}",
                "add{a:}",
                "add{a:NaN}",
                "add{a:1e999}",
                "add{a:<escape>b}",
                "add{a:1 b:2}",
                "add{} x",
                "add{a:" + "[" * 9999,
            )
        ],
        ("<start_function_call>call:add{", "<start_function_call>call:add{", []),
    ],
)
def test_function_gemma_answers(text, content, calls, size):
    if size == 1 and len(text) > 999:
        return
    assert parse(FunctionGemmaToolFormat().parser(TOOLS), text, size) == (content, calls)


# Gemma 3


def test_gemma3_prompt(tokenizers):
    system = {"role": "system", "content": "Be brief."}
    messages = [system, QUESTION, CALLS, RESULT, {"role": "user", "content": "Thanks!"}]
    text = prompt(tokenizers, "gemma3", messages, TOOLS[2:])
    definitions = '[{"name": "now", "description": "", "parameters": {"type": "object", '
    assert text.startswith("<bos><start_of_turn>user\nBe brief.\n\nYou can call the functions")
    assert definitions in text
    assert text.endswith(
        "<start_of_turn>model\n"
        '{"name":"get_current_weather","parameters":{"location":"Tokyo, Japan"}}<end_of_turn>\n'
        "<start_of_turn>user\nResults of the functions:\n"
        '{"name":"get_current_weather","result":"{\\"temperature\\": 15, \\"weather\\": '
        '\\"sunny\\"}"}\n\nThanks!<end_of_turn>\n<start_of_turn>model\n'
    )
    tokenizer = tokenizers["gemma3"]
    plain = prompt(tokenizers, "gemma3", [system, QUESTION], ())
    assert plain == tokenizer.apply_chat_template([system, QUESTION], tokenize=False)


def test_gemma3_calls_in_a_prompt_are_read_again(tokenizers):
    function = {"name": "add", "arguments": {"numbers": [1], "é": "}"}}
    message = {"role": "assistant", "content": "", "tool_calls": [{"function": function}] * 2}
    *_, reply = Gemma3ToolFormat().messages([QUESTION, message])
    expected = [("add", function["arguments"])] * 2
    assert parse(Gemma3ToolFormat().parser(TOOLS), reply["content"]) == ("", expected)


OBJECT = '{"name": "add", "parameters": {"numbers": [1, 2]}}'
SUM = ("add", {"numbers": [1, 2]})


@pytest.mark.parametrize("size", [None, 1, 5])
@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (OBJECT, "", [SUM]),
        (f"\n [{OBJECT},\n{OBJECT}]", "", [SUM, SUM]),
        (f"{OBJECT}\n{OBJECT}", "", [SUM, SUM]),
        (f"```json\n{OBJECT}\n```", "", [SUM]),
        (f"```\n{OBJECT}\n```\nDone.", "Done.", [SUM]),
        (f"{OBJECT} Done.", "Done.", [SUM]),
        ('{"name":"add","arguments":"{\\"numbers\\":[1,2]}"}', "", [SUM]),
        ('{"name": "now"}', "", [("now", {})]),
        ("[add(numbers=[1, 2]), now()]", "", [SUM, ("now", {})]),
        ("add([1, 2], exact=True)", "", [("add", {"numbers": [1, 2], "exact": True})]),
        ("```tool_code\n[add(numbers=[1, 2])]\n```", "", [SUM]),
        *[
            (text, text, [])
            for text in (
                "",
                "  ",
                "Hello!",
                "nowhere",
                "[link](page)",
                "```python\nprint(1)\n```",
                "`code`",
                "``",
                '{"answer": 3}',
                '{"name": "other", "parameters": {}}',
                '{"name": "add", "parameters": 3}',
                '{"name": "add", "parameters": {"a": NaN}}',
                '{"name": "add", "parameters": {"a": 1',
                f'[{OBJECT}, {{"name": "x"}}]',
                "add(",
                "add(1, 2, 3)",
                "add(**x)",
                "add(numbers=open('x'))",
                "add(numbers={1})",
                "now().x",
                '{"name": "add", "parameters": {"a": ' + "[" * 99999,
                "add(" + "(" * 999,
            )
        ],
    ],
)
def test_gemma3_answers(text, content, calls, size):
    if size == 1 and len(text) > 999:
        return
    assert parse(Gemma3ToolFormat().parser(TOOLS), text, size) == (content, calls)


def test_text_streams_at_once():
    for format in (Gemma3ToolFormat(), FunctionGemmaToolFormat()):
        parser = format.parser(TOOLS)
        assert parser.push("The ") == [TextDelta("The ")]
        assert parser.push("sum") == [TextDelta("sum")]
        assert parser.finish() == []


# Both


def random_answer(tokenizer, response_format, seed):
    """Returns the text of random tokens that a response format allows."""
    constraint, ids = GrammarCompiler(tokenizer).compile(response_format)(), []
    generator = random.Random(seed)
    plain = [tokenizer.token_to_id(character) for character in 'abc01"]}']
    plain += tokenizer.pieces.control_tokens.values()
    while len(ids) < 900:
        bits = np.unpackbits(constraint.allowed().view("uint8"), bitorder="little")
        allowed = np.flatnonzero(bits).tolist()
        stops = set(tokenizer.stop_token_ids) & set(allowed)
        if stops:
            break
        id = generator.choice([id for id in allowed if id in plain] or allowed)
        constraint.accept(id)
        ids.append(id)
    return tokenizer.detokenize(ids, skip_special_tokens=False)


@pytest.mark.parametrize("name", ["gemma3", "functiongemma"])
@pytest.mark.parametrize("choice", ["required", "add", "get_current_weather"])
def test_required_calls(tokenizers, name, choice):
    tokenizer = tokenizers[name]
    format = tool_format_of(tokenizer)
    tool_choice = choice
    if choice != "required":
        tool_choice = {"type": "function", "function": {"name": choice}}
    tools = [tool for tool in TOOLS if choice in ("required", tool.name)]
    response_format = format.response_format(TOOLS, tool_choice)
    for seed in range(6):
        text = random_answer(tokenizer, response_format, seed)
        content, calls = parse(format.parser(tools), text)
        assert content == "", text
        assert calls, text
        for called, arguments in calls:
            tool = next(tool for tool in TOOLS if tool.name == called)
            assert arguments.keys() <= tool.parameters["properties"].keys()
            assert arguments.keys() >= set(tool.parameters.get("required", ()))
            assert arguments.get("unit", "celsius") in ("celsius", "fahrenheit")


def test_answers_that_may_be_text():
    for format in (Gemma3ToolFormat(), FunctionGemmaToolFormat()):
        for choice in ("none", "auto", None):
            assert format.response_format(TOOLS, choice) is None


def nested(levels):
    schema = {"type": "string"}
    for _ in range(levels // 2):
        schema = {"type": "object", "properties": {"x": schema}}
    return schema


@pytest.mark.parametrize("name", ["gemma3", "functiongemma"])
@pytest.mark.parametrize("schema", [True, nested(90), {"type": ["null", "string"]}, {"enum": []}])
def test_unusual_schemas(tokenizers, name, schema):
    parameters = {"type": "object", "properties": {"x": schema, "y": {"items": [schema]}}}
    tools, format = read_tools([{"name": "f", "parameters": parameters}]), TOOL_FORMATS[name]
    assert format.encode(tokenizers[name], [QUESTION], tools)
    assert format.response_format(tools, "required")


@pytest.mark.parametrize("name", ["gemma3", "functiongemma"])
def test_results_of_many_levels_are_text(tokenizers, name):
    text = '{"a":' * 500 + "1" + "}" * 500
    ids = TOOL_FORMATS[name].encode(
        tokenizers[name], [QUESTION, CALLS, {**RESULT, "content": text}]
    )
    assert len(ids) > 500


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ([3], r"must be dicts .* Received: tools\[0\]=3"),
        ([{"type": "retrieval"}], "must be dicts"),
        ([NOW, {"type": "function", "function": {}}], r"tools\[1\]\.function\.name=None"),
        ([{"name": "a b"}], "name of a tool must have"),
        ([NOW, NOW], "must be unique. Received: two tools 'now'"),
        ([{"name": "a", "parameters": {"type": "string"}}], "of type 'object'"),
        *(
            ([{"name": "a", "parameters": {"properties": {"x": schema}}}], message)
            for schema, message in [
                (3, r"must be a dict. Received: tools\[0\].function.parameters.properties.x=3"),
                ({"required": 5}, "'required' .* must be a list of strings"),
                ({"required": ["a", 5]}, "'required' .* must be a list of strings"),
                ({"properties": ["a"]}, "'properties' .* must be a dict"),
                ({"type": {"a": 1}}, "'type' .* must be a string or a list"),
                ({"type": [3]}, "'type' .* must be a string or a list"),
                ({"enum": 3}, "'enum' .* must be a list"),
                ({"items": 3}, "must be a dict. Received: .*items=3"),
                ({"items": {"items": {"properties": 3}}}, r"items.items.properties=3"),
                ({"description": 3}, "'description' .* must be a string"),
                (nested(150), "at most 100 levels"),
            ]
        ),
    ],
)
def test_bad_tools(tools, message):
    with pytest.raises(ValueError, match=message):
        read_tools(tools)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("any", "`tool_choice` must be one of 'none', 'auto', 'required', or a dict"),
        ({"type": "function"}, "must be one of 'none'"),
        ({"function": {"name": "x"}}, r"must name one of: .*'now'\. Received: 'x'"),
    ],
)
def test_bad_choices(choice, message):
    with pytest.raises(ValueError, match=message):
        Gemma3ToolFormat().response_format(TOOLS, choice)


def test_required_without_tools():
    with pytest.raises(ValueError, match="'required' needs `tools`"):
        FunctionGemmaToolFormat().response_format([], "required")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one user message"),
        ([{"role": "user"}], "has no content"),
        ([{"role": "pope", "content": ""}], "must be 'user', 'assistant' or 'tool'"),
        ([QUESTION, {"role": "system", "content": "x"}], "'system' in the first message"),
        ([QUESTION, CALLS, {**RESULT, "tool_call_id": "x"}], "'tool_call_id' of an earlier call"),
        ([QUESTION, {**CALLS, "tool_calls": [3]}], r"Received in messages\[1\]\['tool_calls'\]: 3"),
        (
            [QUESTION, {**CALLS, "tool_calls": [{"function": {"name": "a", "arguments": "[]x"}}]}],
            "arguments a JSON object",
        ),
        ([QUESTION, CALLS], "must have a result after each message with calls"),
        ([QUESTION, CALLS, QUESTION], "must have a result after each message with calls"),
    ],
)
def test_bad_messages(tokenizers, messages, message):
    with pytest.raises(ValueError, match=message):
        prompt(tokenizers, "functiongemma", messages)


def test_a_vocabulary_without_control_tokens(tokenizers):
    with pytest.raises(ValueError, match="has no <start_function_declaration>"):
        FunctionGemmaToolFormat().encode(tokenizers["gemma3"], [QUESTION], TOOLS)

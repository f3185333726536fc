"""Random tokens among the allowed ones always end in a text of the format."""

import json
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from keras_gemma.text import GemmaTokenizer, grammar
from keras_gemma.text.grammar import GrammarCompiler, token_bytes

PRESETS = Path(__file__).parents[2] / "presets"
SCHEMA = {
    "type": "object",
    "properties": {
        "age": {"type": "integer", "minimum": 0, "maximum": 999},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 9}, "maxItems": 2},
        "city": {"enum": ["Zürich", "東京", 'a "b"\n', "😀"]},
    },
    "required": ["age", "city"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer():
    return GemmaTokenizer(PRESETS / "gemma_tiny_instruct_en/assets/tokenizer/vocabulary.spm")


@pytest.fixture(scope="module")
def compiler(tokenizer):
    return GrammarCompiler(tokenizer, 500)


def ids_of(words):
    return np.flatnonzero([words[id // 32] >> (id % 32) & 1 for id in range(32 * len(words))])


def random_text(new_constraint, tokenizer, seed):
    """Returns the text of random tokens that `new_constraint()` allows, up to a stop token."""
    generator, constraint, ids = random.Random(seed), new_constraint(), []
    while len(ids) < 500:
        allowed = ids_of(constraint.allowed())
        assert len(allowed)
        id = int(generator.choice(allowed))
        if id in tokenizer.stop_token_ids:
            return tokenizer.detokenize(ids, skip_special_tokens=False)
        constraint.accept(id)
        ids.append(id)
    raise AssertionError(f"no end: {tokenizer.detokenize(ids)!r}")


def is_valid(value):
    return (
        {"age", "city"} <= value.keys() <= SCHEMA["properties"].keys()
        and isinstance(value["age"], int)
        and 0 <= value["age"] <= 999
        and value["city"] in SCHEMA["properties"]["city"]["enum"]
        and all(isinstance(tag, str) and len(tag) <= 9 for tag in value.get("tags", []))
        and len(value.get("tags", [])) <= 2
    )


@pytest.mark.parametrize("seed", range(20))
def test_random_tokens_are_json_of_the_schema(seed, compiler, tokenizer):
    text = random_text(compiler.compile(SCHEMA), tokenizer, seed)
    assert is_valid(json.loads(text)), text


@pytest.mark.parametrize(
    ("response_format", "pattern"),
    [
        ({"type": "regex", "regex": "(abc|日本)+x"}, "(abc|日本)+x"),
        ({"type": "lark", "grammar": 'start: "a" B\nB: /[0-9]{1,9}/'}, "a[0-9]{1,9}"),
        ({"type": "choice", "choices": ['"a"\n', "▁b\\", "/c/", "é"]}, r'"a"\n|▁b\\|/c/|é'),
        ({"type": "boolean"}, "true|false"),
    ],
)
def test_random_tokens_match(response_format, pattern, compiler, tokenizer):
    new_constraint = compiler.compile(response_format)
    for seed in range(8):
        text = random_text(new_constraint, tokenizer, seed)
        assert re.fullmatch(pattern, text), text


def test_json_object(compiler, tokenizer):
    constraint = compiler.compile({"type": "json_object"})()
    text = '{"é日":[1,{"<eos>":null}],"b":"<unused7>"}'
    for id in tokenizer.encode([text], parse_special=False)[0]:
        allowed = set(ids_of(constraint.allowed()).tolist())
        assert id in allowed
        assert not allowed & {*tokenizer.pieces.control_tokens.values()}
        constraint.accept(id)
    assert ids_of(constraint.allowed()).tolist() == tokenizer.stop_token_ids


def test_white_space_is_not_allowed(compiler, tokenizer):
    constraint = compiler.compile({"type": "json_object"})()
    texts = [token_bytes(tokenizer.pieces)[id] for id in ids_of(constraint.allowed())]
    assert not any(text[:1].isspace() for text in texts)


def test_each_call_is_a_new_constraint(compiler, tokenizer):
    new_constraint = compiler.compile({"type": "choice", "choices": ["ab", "cd"]})
    first, second = new_constraint(), new_constraint()
    first.accept(tokenizer.token_to_id("a"))
    assert tokenizer.token_to_id("c") not in ids_of(first.allowed())
    assert tokenizer.token_to_id("c") in ids_of(second.allowed())


def test_text_needs_no_constraint(compiler):
    assert compiler.compile({"type": "text"}) is None


def test_words_cover_all_logits(compiler, tokenizer):
    assert compiler.compile({"type": "json_object"})().allowed().shape == (16,)
    assert tokenizer.vocabulary_size() == 491


def test_bytes_of_tokens(tokenizer):
    """SentencePiece writes the same text for every token that is valid UTF-8."""
    controls = set(tokenizer.pieces.control_tokens.values())
    for id, text in enumerate(token_bytes(tokenizer.pieces)):
        if id not in controls:
            assert tokenizer.detokenize([id]) == text.decode(errors="replace")


def test_pydantic_class(compiler, tokenizer):
    pydantic = pytest.importorskip("pydantic")

    class Point(pydantic.BaseModel):
        x: int = pydantic.Field(ge=0, le=99)
        is_red: bool

    text = random_text(compiler.compile(Point), tokenizer, 0)
    Point.model_validate_json(text)


def schema(value, **options):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": value, **options}}


@pytest.mark.parametrize(
    ("response_format", "message"),
    [
        ({}, "must have the key 'type' with one of 'text', "),
        ({"type": "xml"}, r"Received: response_format=\{'type': 'xml'\}"),
        ({"type": ["regex"]}, "must have the key 'type'"),
        ({"type": "json_schema"}, "must have the key 'json_schema' with a dict"),
        ({"type": "json_schema", "json_schema": {"schema": 3}}, "whose schema is a dict"),
        ({"type": "regex", "regex": ""}, "a non-empty string. Received: regex=''"),
        ({"type": "choice", "choices": []}, r"a list of non-empty strings. Received: choices=\[\]"),
        ({"type": "choice", "choices": ["a", 3]}, "a list of non-empty strings"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, r"minimum \(5\) is greater"),
        (schema({"not": {}}), r"Unimplemented keys: \[\"not\"\].*set 'strict' to False"),
        (schema({"$ref": "#/x"}), "'/x' does not exist"),
        (schema({"default": float("nan")}), "cannot be compiled"),
        ({"type": "regex", "regex": "(abc"}, "unclosed group"),
        ({"type": "regex", "regex": r"[^\s\S]"}, "no text satisfies it"),
        ({"type": "lark", "grammar": "start: foo"}, 'unknown name: "foo"'),
    ],
)
def test_bad_formats(response_format, message, compiler):
    with pytest.raises(ValueError, match="(?s)`response_format`.*" + message):
        compiler.compile(response_format)


def test_a_schema_of_many_levels(compiler):
    nested = {"type": "string"}
    for _ in range(5000):
        nested = {"type": "array", "items": nested}
    with pytest.raises(ValueError, match="Received: json_schema=a dict with too many levels"):
        compiler.compile(schema(nested))


@pytest.mark.parametrize(
    ("response_format", "problem"),
    [
        ({"type": "choice", "choices": ["a"] * 4001}, "4001 alternatives, more than 4000"),
        ({"type": "regex", "regex": "a|" * 4000}, "4001 alternatives"),
        ({"type": "lark", "grammar": "start: " + '"a" | ' * 4000 + '"b"'}, "4001 alternatives"),
        (schema({"enum": list(range(1001))}), "1001 properties or items in one place"),
        (schema({"properties": {str(i): {} for i in range(1001)}}), "1001 properties"),
        ({"type": "regex", "regex": "a" * (1 << 17)}, "bytes, more than 131072"),
    ],
)
def test_formats_that_would_compile_for_seconds(response_format, problem, compiler, monkeypatch):
    monkeypatch.setattr(grammar, "grammar_of", None)
    with pytest.raises(ValueError, match=rf"`response_format` has .*{problem}.* Simplify '"):
        compiler.compile(response_format)


def test_compiled_formats_are_kept(compiler, tokenizer, monkeypatch):
    properties = {"b": {"const": 1}, "a": {"const": 2}}
    one = {"type": "object", "properties": properties, "required": ["a", "b"]}
    other = one | {"properties": {"a": {"const": 2}, "b": {"const": 1}}}
    texts = [random_text(compiler.compile(schema(value)), tokenizer, 0) for value in (one, other)]
    assert texts == ['{"b":1,"a":2}', '{"a":2,"b":1}']
    monkeypatch.setattr(grammar, "grammar_of", None)
    assert random_text(compiler.compile(schema(one)), tokenizer, 1) == texts[0]


def test_not_a_format(compiler):
    with pytest.raises(TypeError, match=r"must be a dict such as .* Received: response_format=3"):
        compiler.compile(3)


def test_unsupported_keywords_without_strict(compiler):
    assert compiler.compile(schema({"type": "integer", "not": {}}, strict=False)) is not None


def test_a_token_that_is_not_allowed(compiler):
    constraint = compiler.compile({"type": "regex", "regex": "a"})()
    with pytest.raises(ValueError, match="cannot be followed"):
        constraint.accept(5)


def test_missing_package(monkeypatch, tokenizer):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.setattr("keras_gemma.extras.is_installed", lambda name: False)
    with pytest.raises(ImportError, match=r"needs llguidance. Install .*\[serve\]"):
        GrammarCompiler(tokenizer)

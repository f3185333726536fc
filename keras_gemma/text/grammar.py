"""Structured output: grammars as masks over the vocabulary. Needs the package llguidance.

Knows nothing about models: a constraint says which tokens may come next, and `generation/` applies
the mask.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from keras_gemma.extras import check_structured_output
from keras_gemma.text.pieces import SPACE, Pieces
from keras_gemma.text.tokenizer import GemmaTokenizer

ResponseFormat = Mapping[str, Any]
"""Format of the output, a dict with a `"type"` of `FIELDS`, as in OpenAI's API."""

FIELDS = {
    "text": None,
    "json_object": None,
    "json_schema": "json_schema",
    "regex": "regex",
    "lark": "grammar",
    "choice": "choices",
}
"""Field with the value of each type of response format. `None` if the type has no value."""

MAX_FORMAT_BYTES = 1 << 17
"""Maximum size of a response format as JSON: larger ones compile for seconds."""

MAX_ALTERNATIVES = 4000
"""Maximum number of choices, or of `|` in a grammar or regular expression. llguidance needs 0.2 s
for 4,000 choices, and 4.7 s for 8,000."""

MAX_SCHEMA_ITEMS = 1000
"""Maximum number of properties of an object in a JSON schema, and of items of a list. llguidance
needs 1 s for 1,000 properties, and 6 s for 2,000."""

MAX_COMPILED_FORMATS = 32
"""Number of compiled response formats that are kept."""

JSON_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")


def read_response_format(response_format: Any) -> ResponseFormat:
    """Returns a response format as a dict with a `"type"` of `FIELDS`.

    Args:
        response_format: Such a dict, a JSON schema, or a class of pydantic.

    Raises:
        TypeError: If it is neither a dict nor a class of pydantic.
        ValueError: If the type is unknown, or its value is missing or of the wrong type.
    """
    if isinstance(response_format, type) and hasattr(response_format, "model_json_schema"):
        name, schema = response_format.__name__, _closed(response_format.model_json_schema())
        return {"type": "json_schema", "json_schema": {"name": name, "schema": schema}}
    if not isinstance(response_format, Mapping):
        raise TypeError(
            "`response_format` must be a dict such as {'type': 'json_object'}, a JSON schema, or a "
            f"class of pydantic. Received: response_format={response_format!r:.80}"
        )
    kind = response_format.get("type")
    if isinstance(kind, str) and kind in JSON_TYPES:
        return {"type": "json_schema", "json_schema": {"schema": dict(response_format)}}
    if not isinstance(kind, str) or kind not in FIELDS:
        raise ValueError(
            f"`response_format` must have the key 'type' with one of {', '.join(map(repr, FIELDS))}"
            f", or be a JSON schema with a type. Received: response_format={response_format!r:.80}"
        )
    field = FIELDS[kind]
    value = response_format.get(field)
    if kind == "json_schema":
        valid = isinstance(value, Mapping) and isinstance(value.get("schema"), Mapping)
        expected = "a dict {'name': ..., 'schema': ...} whose schema is a dict"
    elif kind == "choice":
        valid = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
        valid = valid and all(isinstance(choice, str) and choice for choice in value)
        expected = "a list of non-empty strings"
    else:
        valid = field is None or (isinstance(value, str) and value != "")
        expected = "a non-empty string"
    if not valid:
        raise ValueError(
            f"`response_format` of type {kind!r} must have the key {field!r} with {expected}. "
            f"Received: {field}={value!r:.80}"
        )
    return response_format


def _closed(schema: Any) -> Any:
    """Returns a JSON schema whose objects allow no additional properties by default."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {"additionalProperties": False} if schema.get("type") == "object" else {}
    return closed | {key: _closed(value) for key, value in schema.items()}


class GrammarConstraint:
    """Tokens that may continue one sequence. See `TokenConstraint` in `generation/`."""

    def __init__(self, matcher: Any, num_words: int) -> None:
        self.matcher = matcher
        self.num_words = num_words

    def allowed(self) -> np.ndarray:
        """Returns the allowed tokens as bits, int32 `[num_words]`.

        Once the grammar is complete and cannot be continued, these are the stop tokens.

        Raises:
            ValueError: If the grammar exceeds llguidance's limits here.
        """
        bits = np.frombuffer(self.matcher.compute_bitmask(), "int32")[: self.num_words]
        self._check()
        return np.pad(bits, (0, self.num_words - len(bits)))

    def accept(self, token_id: int) -> None:
        """Adds the chosen token. Stop tokens are not passed.

        Raises:
            ValueError: If the token is not allowed.
        """
        self.matcher.consume_token(int(token_id))
        self._check()

    def _check(self) -> None:
        if self.matcher.is_error():
            raise ValueError(
                "`response_format` cannot be followed any further. Simplify its schema or grammar. "
                f"llguidance reports: {_cause(self.matcher):.500}"
            )


class GrammarCompiler:
    """Compiler of response formats for one vocabulary.

    Control tokens cannot be part of a text, and all other tokens are bytes. Stop tokens are
    allowed where the text may end.

    Args:
        tokenizer: Tokenizer of the model.
        vocabulary_size: Number of logits of the model. Defaults to the size of the vocabulary.

    Raises:
        ImportError: If llguidance is not installed.
    """

    def __init__(self, tokenizer: GemmaTokenizer, vocabulary_size: int | None = None) -> None:
        check_structured_output()
        import llguidance

        self.pieces = tokenizer.pieces
        self.num_words = -(-(vocabulary_size or self.pieces.size) // 32)
        self.tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Vocabulary(self.pieces, tokenizer.start_token_id)),
            eos_token=tokenizer.stop_token_ids,
        )
        self._compile = functools.lru_cache(MAX_COMPILED_FORMATS)(self._compile_json)

    def compile(self, response_format: Any) -> Callable[[], GrammarConstraint] | None:
        """Returns a function that returns a new constraint. `None` for the type `"text"`.

        Args:
            response_format: Same as in `read_response_format`.

        Raises:
            TypeError: Same as in `read_response_format`.
            ValueError: If the response format is invalid or too large, has keywords of JSON schemas
                that llguidance does not support, or no text satisfies it.
        """
        response_format = read_response_format(response_format)
        if response_format["type"] == "text":
            return None
        try:
            # Keys are not sorted, because their order is that of the properties in the text.
            text = json.dumps(response_format)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(_message(response_format, str(error))) from error
        check_size(response_format, len(text))
        return self._compile(text)

    def _compile_json(self, text: str) -> Callable[[], GrammarConstraint]:
        response_format = json.loads(text)
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(verbose_errors=False)
        grammar = grammar_of(response_format)
        matcher = LLMatcher(self.tokenizer, grammar, log_level=0, limits=limits)
        matcher.compute_bitmask()
        if matcher.is_error():
            raise ValueError(_message(response_format, _cause(matcher)))
        return lambda: GrammarConstraint(matcher.deep_copy(), self.num_words)


def check_can_end(
    ends: Sequence[int], stop_token_ids: Sequence[int], remedy: str = "Leave `stop_token_ids` out"
) -> None:
    """Raises a ValueError unless a text with a constraint can end.

    When the format is complete, only the stop tokens of the model are allowed. If one of them does
    not end the text, it is repeated up to `max_new_tokens`.

    Args:
        ends: Stop tokens of the model.
        stop_token_ids: Tokens that end the text.
        remedy: What to do, without a period.
    """
    if not set(ends) <= set(stop_token_ids):
        raise ValueError(
            f"With `response_format`, `stop_token_ids` must have the ids {list(ends)}, because the "
            f"text ends with one of them. {remedy}. "
            f"Received: stop_token_ids={list(stop_token_ids)}"
        )


def check_size(response_format: ResponseFormat, num_bytes: int) -> None:
    """Raises a ValueError if llguidance would need seconds for a response format.

    Args:
        response_format: The response format.
        num_bytes: Its size as JSON.
    """
    kind = response_format["type"]
    value = response_format.get(FIELDS[kind])
    if num_bytes > MAX_FORMAT_BYTES:
        problem = f"has {num_bytes} bytes, more than {MAX_FORMAT_BYTES}"
    elif kind == "json_schema":
        count = largest(value["schema"])
        problem = f"has {count} properties or items in one place, more than {MAX_SCHEMA_ITEMS}"
        problem = problem if count > MAX_SCHEMA_ITEMS else ""
    elif kind == "json_object":
        return
    else:
        count = len(value) if kind == "choice" else value.count("|") + 1
        problem = f"has {count} alternatives, more than {MAX_ALTERNATIVES}"
        problem = problem if count > MAX_ALTERNATIVES else ""
    if problem:
        raise ValueError(
            f"`response_format` {problem}, and would take long to compile. Simplify "
            f"{FIELDS[kind]!r}. Received: type={kind!r}"
        )


def largest(value: Any) -> int:
    """Returns the length of the longest dict or list in a JSON value."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, list | tuple):
        return 0
    return max(len(value), *map(largest, value), 0)


def grammar_of(response_format: ResponseFormat) -> str:
    """Returns the grammar of a response format, in llguidance's format."""
    from llguidance import LLMatcher

    kind = response_format["type"]
    if kind == "regex":
        return LLMatcher.grammar_from_regex(response_format["regex"])
    if kind == "lark":
        return LLMatcher.grammar_from_lark(response_format["grammar"])
    if kind == "choice":
        choices = " | ".join(json.dumps(choice) for choice in response_format["choices"])
        return LLMatcher.grammar_from_lark(f"start: {choices}")
    envelope = response_format.get("json_schema", {"schema": {"type": "object"}})
    # Otherwise a model may write white space between tokens for ever.
    options = {"whitespace_flexible": False, "lenient": envelope.get("strict") is False}
    try:
        return LLMatcher.grammar_from_json_schema(json.dumps(envelope["schema"]), overrides=options)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(_message(response_format, str(error))) from error


def _cause(matcher: Any) -> str:
    """Returns why a matcher is in its error state."""
    error = matcher.get_error().replace("<non-verbose/>", "").strip()
    return "no text satisfies it" if error.startswith("NoExtension") else error


def _message(response_format: ResponseFormat, cause: str) -> str:
    kind = response_format["type"]
    field = FIELDS[kind]
    try:
        received = repr(response_format.get(field))
    except RecursionError:
        received = "a dict with too many levels"
    remedy = f"Correct or simplify {field!r}"
    if kind == "json_schema":
        remedy += ", or set 'strict' to False to ignore unsupported keywords"
    return (
        f"`response_format` of type {kind!r} cannot be compiled: {cause:.500}. {remedy}. "
        f"Received: {field}={received:.200}"
    )


class _Vocabulary:
    """The vocabulary as llguidance reads it."""

    def __init__(self, pieces: Pieces, start_token_id: int) -> None:
        self.pieces = pieces
        self.bos_token_id = start_token_id
        self.eos_token_id = pieces.processor.eos_id()
        self.special_token_ids = list(pieces.control_tokens.values())
        self.tokens = token_bytes(pieces)

    def __call__(self, text: str | bytes) -> list[int]:
        text = text if isinstance(text, str) else text.decode()
        return self.pieces.encode([text], parse_special=False)[0]


def token_bytes(pieces: Pieces) -> list[bytes]:
    """Returns the text of each token in UTF-8, or a part of it. Control tokens have their names."""
    controls = set(pieces.control_tokens.values())
    is_byte = pieces.processor.is_byte
    texts = []
    for id, name in enumerate(pieces.names()):
        if is_byte(id):
            texts.append(bytes([int(name[3:5], 16)]))  # "<0x0A>"
        else:
            texts.append((name if id in controls else name.replace(SPACE, " ")).encode())
    return texts

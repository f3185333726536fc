"""Samples of training data in all accepted formats, converted to turns or plain text.

Knows nothing about tokens and files.

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}
    {"prompt": ..., "completion": ...}                  strings, or lists of messages
    {"instruction": ..., "context": ..., "response": ...}    Dolly; also "input" and "output"
    {"text": ...}, or a string                          plain text, learned as a whole
"""

from collections.abc import Mapping
from typing import Any

from keras_gemma.text.chat import Turn, message_text, read_turns

FORMATS = "messages; prompt and completion; instruction, context and response; or text"


class BadSample(ValueError):
    """Error for an unusable sample. Its message is a sentence without a full stop."""


def read_sample(record: Any) -> list[Turn] | str:
    """Converts a sample to the turns of a conversation, or to plain text.

    Args:
        record: A sample in one of the formats of this module. A conversation may begin with a
            system message, and the role of a reply may be `"assistant"` or `"model"`.

    Raises:
        BadSample: If the format is unknown, roles do not alternate, or a text is missing or empty.

    Example:

    ```python
    from keras_gemma.training.samples import read_sample

    read_sample({"instruction": "Spell cat.", "context": "", "response": "c-a-t"})
    ```
    """
    if isinstance(record, str):
        return _check_text("the text", record)
    if not isinstance(record, Mapping):
        raise BadSample(f"a sample must be an object or a string, not {type(record).__name__}")
    if "messages" in record:
        return _read_conversation(record["messages"])
    if "prompt" in record and "completion" in record:
        prompt, completion = record["prompt"], record["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            return _read_question(prompt, completion)
        if isinstance(prompt, list | tuple) and isinstance(completion, list | tuple):
            return _read_conversation([*prompt, *completion])
        raise BadSample("'prompt' and 'completion' must be two strings or two lists of messages")
    if "instruction" in record:
        answer = next((name for name in ("response", "output") if name in record), None)
        if answer is None:
            raise BadSample("an 'instruction' needs a 'response' or an 'output'")
        question = _check_text("'instruction'", record["instruction"])
        context = record.get("context", record.get("input")) or ""
        if not isinstance(context, str):
            raise BadSample(f"the context must be a string, not {type(context).__name__}")
        return _read_question(f"{question}\n\n{context}", record[answer])
    if "text" in record:
        return _check_text("'text'", record["text"])
    raise BadSample(f"unknown format with keys {sorted(map(str, record))}; use {FORMATS}")


def _read_question(question: str, answer: Any) -> list[Turn]:
    return _read_conversation(
        [{"role": "user", "content": question}, {"role": "model", "content": answer}]
    )


def _read_conversation(messages: Any) -> list[Turn]:
    """Same as `read_turns`, but each message must have text, and the model must have a turn."""
    try:
        turns = read_turns(messages)
    except (TypeError, ValueError) as error:
        raise BadSample(str(error)) from error
    for i, message in enumerate(messages):
        if not message_text(message):
            raise BadSample(f"message {i}, of the role {message['role']!r}, is empty")
    if len(turns) < 2:
        raise BadSample("a conversation needs a user turn and a model turn")
    for turn in turns[1::2]:
        if turn.role != "model":
            raise BadSample(f"a reply must have the role 'assistant' or 'model', not {turn.role!r}")
    return turns


def _check_text(name: str, text: Any) -> str:
    if not isinstance(text, str):
        raise BadSample(f"{name} must be a string, not {type(text).__name__}")
    if not text.strip():
        raise BadSample(f"{name} is empty")
    return text

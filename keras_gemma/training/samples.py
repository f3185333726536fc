"""What a line of training data says: turns of a conversation, or a plain text.

Knows the forms that data sets come in, and neither tokens nor files.

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}
    {"prompt": ..., "completion": ...}                  strings, or lists of messages
    {"instruction": ..., "context": ..., "response": ...}    Dolly; also "input" and "output"
    {"text": ...}, or a string                          a plain text, learned as a whole
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

ROLES = {"user": "user", "assistant": "model", "model": "model"}
"""What a turn may be called in data, and what Gemma calls it. A system message is no turn."""

FORMS = "messages; prompt and completion; instruction, context and response; or text"


class BadSample(ValueError):
    """A sample that cannot be learned from; its text says why."""


class Turn(NamedTuple):
    """One turn of a conversation."""

    role: str
    """`"user"` or `"model"`."""
    content: str
    """Without white space at its ends, as the chat template has it."""


def read_sample(record: Any) -> list[Turn] | str:
    """The turns of a conversation, or a plain text.

    A system message becomes the beginning of the first turn, as in the chat template.

    Raises:
        BadSample: an unknown form, roles out of order, something missing or empty.

    Example:

    ```python
    from keras_gemma.training.samples import read_sample

    read_sample({"instruction": "Spell cat.", "context": "", "response": "c-a-t"})
    ```
    """
    if isinstance(record, str):
        return _filled("the text", record)
    if not isinstance(record, Mapping):
        raise BadSample(f"a sample must be an object or a string, not {type(record).__name__}")
    if "messages" in record:
        return _turns(record["messages"])
    if "prompt" in record and "completion" in record:
        prompt, completion = record["prompt"], record["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            return _one_answer(prompt, completion)
        if isinstance(prompt, list | tuple) and isinstance(completion, list | tuple):
            return _turns([*prompt, *completion])
        raise BadSample("'prompt' and 'completion' must be two strings or two lists of messages")
    if "instruction" in record:
        answer = next((name for name in ("response", "output") if name in record), None)
        if answer is None:
            raise BadSample("an 'instruction' needs a 'response' or an 'output'")
        question = _filled("'instruction'", record["instruction"])
        context = record.get("context", record.get("input")) or ""
        if not isinstance(context, str):
            raise BadSample(f"the context must be a string, not {type(context).__name__}")
        return _one_answer(f"{question}\n\n{context}", record[answer])
    if "text" in record:
        return _filled("'text'", record["text"])
    raise BadSample(f"no known form in {sorted(map(str, record))}; known are {FORMS}")


def _one_answer(question: Any, answer: Any) -> list[Turn]:
    return [
        Turn("user", _filled("the user's turn", question).strip()),
        Turn("model", _filled("the model's turn", answer).strip()),
    ]


def _turns(messages: Any) -> list[Turn]:
    """Messages, their roles checked, as turns."""
    if not isinstance(messages, list | tuple):
        raise BadSample(f"'messages' must be a list, not {type(messages).__name__}")
    turns: list[Turn] = []
    preface = ""
    for i, message in enumerate(messages):
        if not (isinstance(message, Mapping) and {"role", "content"} <= message.keys()):
            raise BadSample(f"message {i} must be an object with 'role' and 'content'")
        content = _filled(f"message {i}", message["content"]).strip()
        if message["role"] == "system" and i == 0:
            preface = f"{content}\n\n"
            continue
        expected = "model" if len(turns) % 2 else "user"
        role = ROLES.get(str(message["role"]))
        if role != expected:
            wanted = "'assistant' or 'model'" if expected == "model" else "'user'"
            raise BadSample(
                f"message {i} has the role {message['role']!r} where {wanted} is due: roles are "
                "user, assistant, user, ..., after at most one system message"
            )
        turns.append(Turn(role, content if turns else preface + content))
    if len(turns) < 2:
        raise BadSample("a conversation needs a turn of the user and one of the model")
    return turns


def _filled(name: str, text: Any) -> str:
    if not isinstance(text, str):
        raise BadSample(f"{name} must be a string, not {type(text).__name__}")
    if not text.strip():
        raise BadSample(f"{name} is empty")
    return text

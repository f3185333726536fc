"""Conversations: checks of messages, and their rendering as Gemma turns, in ids or as a string.

A conversation of a system message, two user messages and a reply:

    <bos><start_of_turn>user
    {system}

    {user}<end_of_turn>
    <start_of_turn>model
    {assistant}<end_of_turn>
    <start_of_turn>user
    {user}<end_of_turn>
    <start_of_turn>model

Gemma has no system role, so a system message is prepended to the first user turn. As in Gemma 3's
published template, it keeps its white space, and all other messages are trimmed, as are the parts
of a content that is a list. Knows nothing about models and context lengths.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from keras_gemma.text.pieces import Pieces

START, END = "<start_of_turn>", "<end_of_turn>"

Message = Mapping[str, Any]
"""`{"role", "content"}`. Roles are `"user"`, `"assistant"` or `"model"`, and a first `"system"`.

Content is a string or a list of parts `{"type": "text", "text": ...}`.
"""


@dataclasses.dataclass(frozen=True)
class Turn:
    """Text between the control tokens of one turn: `{role}\\n{text}`."""

    role: str
    text: str

    @property
    def head(self) -> str:
        """Text before the content: the role and a newline."""
        return f"{self.role}\n"


def read_turns(messages: Sequence[Message]) -> list[Turn]:
    """Converts messages to turns, with the system message folded into the first turn.

    Raises:
        TypeError: If `messages` is not a list of messages, or a role or content is not a string.
        ValueError: If the user message is missing, a message has no role or content, or roles do
            not alternate.
    """
    if isinstance(messages, Mapping | str | bytes) or not isinstance(messages, Sequence):
        raise TypeError(
            '`messages` must be a list of {"role": ..., "content": ...}. '
            f"Received: messages={messages!r:.80}"
        )
    for i, message in enumerate(messages):
        check_message(i, message)
    has_system = bool(messages) and messages[0]["role"] == "system"
    preface = "".join(parts_of(messages[0]["content"])) + "\n\n" if has_system else ""
    rest = messages[has_system:]
    if not rest:
        raise ValueError(
            "`messages` must have at least one user message. "
            f"Received: messages={list(messages)!r:.80}"
        )
    turns = []
    for i, message in enumerate(rest):
        role, text = message["role"], message_text(message)
        expected = "assistant" if i % 2 else "user"
        if (role == "user") != (expected == "user"):
            raise ValueError(
                "The roles of `messages` must alternate: user, assistant, user, ..., after an "
                f"optional system message. Message {i + has_system} must have the role "
                f"{expected!r}. Received: role={role!r}, content={message['content']!r:.60}"
            )
        role = "model" if role == "assistant" else role
        turns.append(Turn(role, text if i else preface + text))
    return turns


def message_text(message: Message) -> str:
    """Returns the text of a message's turn: its content without white space around each part."""
    return "".join(part.strip() for part in parts_of(message["content"]))


def parts_of(content: str | Sequence[Mapping[str, str]]) -> list[str]:
    """Returns the texts of a content."""
    return [content] if isinstance(content, str) else [part["text"] for part in content]


def render(turns: Sequence[Turn], start: str, prompt: bool) -> str:
    """Renders turns as a string.

    Args:
        turns: Result of `read_turns`.
        start: The start token, `<bos>`.
        prompt: If True, the string ends with the head of a model turn.
    """
    text = "".join(f"{START}{turn.head}{turn.text}{END}\n" for turn in turns)
    return start + text + (f"{START}model\n" if prompt else "")


def encode_turns(
    turns: Sequence[Turn],
    vocabulary: Pieces,
    prompt: bool,
    replies: Mapping[str, Sequence[int]] | None = None,
) -> tuple[list[int], list[range]]:
    """Encodes turns as token ids. Control tokens written in the text of a turn are plain text.

    Args:
        turns: Result of `read_turns`.
        vocabulary: Vocabulary with the control tokens of turns.
        prompt: If True, the ids end with the head of a model turn.
        replies: Known ids of generated model turns, by their text.

    Returns:
        The ids, and the positions of each model turn: its text and `<end_of_turn>`.

    Raises:
        ValueError: If the vocabulary lacks a control token.
    """
    bos, start, end = control_token_ids(vocabulary)
    generated = [(replies or {}).get(t.text) if t.role == "model" else None for t in turns]
    texts = [
        turn.head + turn.text if reply is None else turn.head
        for turn, reply in zip(turns, generated, strict=True)
    ]
    *encoded, model, newline = vocabulary.encode([*texts, "model\n", "\n"], False)
    ids, spans = [bos], []
    for turn, part, reply in zip(turns, encoded, generated, strict=True):
        begin = len(ids) + 1 + len(model)
        ids += [start, *part, *(reply or ()), end]
        if turn.role == "model":
            spans.append(range(begin, len(ids)))
        ids += newline
    return ([*ids, start, *model] if prompt else ids), spans


def control_token_ids(vocabulary: Pieces) -> tuple[int, int, int]:
    """Returns the ids of `<bos>`, `<start_of_turn>` and `<end_of_turn>`.

    Raises:
        ValueError: If the vocabulary lacks one of them.
    """
    names = ("<bos>", START, END)
    ids = tuple(vocabulary.id_or_none(name) for name in names)
    missing = [name for name, id in zip(names, ids, strict=True) if id is None]
    if missing:
        raise ValueError(
            f"The vocabulary has no {' and no '.join(missing)}, which conversations require. Use "
            "the vocabulary of a Gemma checkpoint, or create one with `train_vocabulary`."
        )
    return ids


def check_message(i: int, message: Any) -> None:
    """Raises a TypeError or ValueError if message `i` has no valid role or content."""
    if not isinstance(message, Mapping):
        raise TypeError(
            '`messages` must be a list of {"role": ..., "content": ...}. '
            f"Received: messages[{i}]={message!r:.80}"
        )
    missing = [name for name in ("role", "content") if name not in message]
    if missing:
        raise ValueError(
            'A message must have a "role" and a "content". '
            f"Message {i} has no {' and no '.join(missing)}. Received: {dict(message)!r:.80}"
        )
    role, content = message["role"], message["content"]
    if not isinstance(role, str):
        raise TypeError(
            f"The role of a message must be a string. Received: messages[{i}]['role']={role!r:.80}"
        )
    if isinstance(content, str):
        return
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise TypeError(
            "The content of a message must be a string or a list of parts "
            '{"type": "text", "text": ...}. '
            f"Received: messages[{i}]['content']={content!r:.80}"
        )
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(
                'Each part of a message must be {"type": "text", "text": ...}, because the models '
                f"read text only. Received in messages[{i}]['content']: {part!r:.80}"
            )

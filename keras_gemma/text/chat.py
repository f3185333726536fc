"""Conversations: messages checked, and as Gemma's turns, in ids or as a string.

A conversation of a system message, two of the user's and a reply:

    <bos><start_of_turn>user
    {system}

    {user}<end_of_turn>
    <start_of_turn>model
    {assistant}<end_of_turn>
    <start_of_turn>user
    {user}<end_of_turn>
    <start_of_turn>model

Gemma knows no system role: such a message stands at the head of the first user turn. Knows no
model, and not how long a conversation may get.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from keras_gemma.text.pieces import Pieces

START, END = "<start_of_turn>", "<end_of_turn>"

Message = Mapping[str, str]
"""`{"role", "content"}`; roles are `"system"`, at the beginning, `"user"` and `"assistant"`."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """What stands between the control tokens: `{role}\\n{text}`."""

    role: str
    text: str

    @property
    def head(self) -> str:
        """What stands before the text."""
        return f"{self.role}\n"


def read_turns(messages: Sequence[Message]) -> list[Turn]:
    """The turns of a conversation, with `system` folded into the first of them.

    Raises:
        TypeError: no list of messages, or content that is no string.
        ValueError: an empty list, a message without role or content, or roles that do not
            alternate; the message is named.
    """
    if isinstance(messages, Mapping | str | bytes) or not isinstance(messages, Sequence):
        raise TypeError(
            '`messages` must be a list of {"role": ..., "content": ...}. '
            f"Received: messages={messages!r:.80}"
        )
    for i, message in enumerate(messages):
        _check_message(i, message)
    system = [] if not messages or messages[0]["role"] != "system" else [messages[0]]
    rest = messages[len(system) :]
    if not rest:
        raise ValueError(
            "`messages` must hold a message of the user's. "
            f"Received: messages={list(messages)!r:.80}"
        )
    turns = []
    for i, message in enumerate(rest):
        role, number = message["role"], i + len(system)
        if (role == "user") != (i % 2 == 0):
            wanted = "user" if i % 2 == 0 else "assistant"
            raise ValueError(
                "`messages` must alternate: user, assistant, user, ..., behind a system message if "
                f"there is one. Message {number} must be of the role {wanted!r}. "
                f"Received: role={role!r}, content={message['content']!r:.60}"
            )
        turns.append(Turn("model" if role == "assistant" else role, message["content"].strip()))
    if system:
        preface = system[0]["content"].strip()
        turns[0] = Turn("user", f"{preface}\n\n{turns[0].text}")
    return turns


def render(turns: Sequence[Turn], start: str, prompt: bool) -> str:
    """The turns as a string.

    Args:
        turns: of `read_turns`.
        start: `<bos>`.
        prompt: whether the model is to speak next.
    """
    text = "".join(f"{START}{turn.head}{turn.text}{END}\n" for turn in turns)
    return start + text + (f"{START}model\n" if prompt else "")


def encode_turns(
    turns: Sequence[Turn],
    vocabulary: Pieces,
    prompt: bool,
    replies: Mapping[str, Sequence[int]] | None = None,
) -> list[int]:
    """The ids of the turns; what is written in them gives no control token.

    Args:
        turns: of `read_turns`.
        vocabulary: has the control tokens of turns.
        prompt: whether the model is to speak next.
        replies: the ids of turns of the model's own, by their text, where they are known.

    Raises:
        ValueError: the vocabulary lacks a control token.
    """
    names = ("<bos>", START, END)
    bos, start, end = (vocabulary.id_or_none(name) for name in names)
    missing = [n for n, id in zip(names, (bos, start, end), strict=True) if id is None]
    if missing:
        raise ValueError(
            f"The vocabulary has no {' and no '.join(missing)}, so it cannot tell turns apart. "
            "Use that of a Gemma checkpoint, or one of `train_vocabulary`."
        )
    heads = {"model\n", *(turn.head for turn in turns), "\n"}
    plain = dict(zip(heads, vocabulary.encode(list(heads), False), strict=True))
    ids = [bos]
    for turn in turns:
        said = (replies or {}).get(turn.text) if turn.role == "model" else None
        if said is None:
            (within,) = vocabulary.encode([turn.head + turn.text], False)
        else:
            within = [*plain[turn.head], *said]
        ids += [start, *within, end, *plain["\n"]]
    return [*ids, start, *plain["model\n"]] if prompt else ids


def _check_message(i: int, message: Any) -> None:
    if not isinstance(message, Mapping):
        raise TypeError(
            '`messages` must be a list of {"role": ..., "content": ...}. '
            f"Received: messages[{i}]={message!r:.80}"
        )
    missing = [name for name in ("role", "content") if name not in message]
    if missing:
        raise ValueError(
            f'Each of `messages` must have a "role" and a "content". Message {i} has no '
            f"{' and no '.join(missing)}. Received: {dict(message)!r:.80}"
        )
    for name in ("role", "content"):
        if not isinstance(message[name], str):
            raise TypeError(
                f"The {name} of a message must be a string. "
                f"Received: messages[{i}][{name!r}]={message[name]!r:.80}"
            )

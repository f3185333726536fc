"""A conversation with a model: its history, and the keys and values of all that has been said.

Each turn is one `Job`, whose prompt is the conversation so far and whose prefix is all of it that
the turns before have left in the cache. Knows no terminal.
"""

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from keras_gemma.causal_lm.settings import GenerationSettings
from keras_gemma.causal_lm.text_request import Job
from keras_gemma.generation.request import Prefix
from keras_gemma.text.chat import Message, read_turns
from keras_gemma.text.tokenizer import GemmaTokenizer

SMALLEST_ROOM = 8
"""The context is full where less than this part of it, 1/8, is left to a reply."""

ROOM_WHEN_DROPPED = 4
"""So much of it, 1/4, is free once turns were dropped: else they would be at every turn, and what
is left be read anew each time."""

CONTEXT_FULL = ("error", "drop_oldest")


class Chat:
    """A conversation; made by `GemmaCausalLM.chat`.

    Attributes:
        system: the system message, or None; it may be changed at any time.
        history: what was said, a list of `{"role": "user" | "assistant", "content": ...}` to read
            and to edit; what is left as it was is not read again, unless it is too far back for
            local layers.
        dropped: the messages that have been dropped, the oldest first.
        prefilled_tokens: how many tokens the latest turn had to read; None before the first.
        cached_tokens: how many of its prompt it did not, for they stood in the cache.
        new_tokens: how many it made.
        finish_reason: `"stop"`, `"length"` where the reply had no more room, or `"closed"` where
            its stream was closed.

    Example:

    ```python
    import keras_gemma

    lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
    chat = lm.chat(system="Speak in verse.", max_new_tokens=20)
    print(chat.send("Who's there?"))
    for piece in chat.stream("Nay, answer me.", temperature=0.8, seed=1):
        print(piece, end="", flush=True)
    print(chat.prefilled_tokens, chat.cached_tokens)

    chat.undo()  # the second turn
    chat.history[-1]["content"] = "Long live the king!"
    chat.send("Bernardo?")
    ```
    """

    def __init__(
        self,
        read_settings: Callable[[dict[str, Any]], GenerationSettings],
        make_job: Callable[[list[int], GenerationSettings, Prefix | None], Job],
        tokenizer: GemmaTokenizer,
        context_length: int,
        system: str | None = None,
        history: Sequence[Message] = (),
        context_full: Literal["error", "drop_oldest"] = "error",
        settings: dict[str, Any] | None = None,
    ) -> None:
        """See `GemmaCausalLM.chat`.

        Args:
            read_settings: what is set in a turn, over what is set anyway.
            make_job: from a prompt's ids, the settings of a turn and what was read before, the
                job that continues it.
            tokenizer: of the model.
            context_length: the most tokens of a conversation.
            system, history, context_full, settings: as there.
        """
        if context_full not in CONTEXT_FULL:
            raise ValueError(
                "`context_full` must be 'error' or 'drop_oldest'. "
                f"Received: context_full={context_full!r}"
            )
        self.system = system
        self.history: list[dict[str, str]] = [dict(message) for message in history]
        self.dropped: list[dict[str, str]] = []
        self.context_full = context_full
        self.settings = dict(settings or {})
        self.prefilled_tokens: int | None = None
        self.cached_tokens: int | None = None
        self.new_tokens: int | None = None
        self.finish_reason: Literal["stop", "length", "closed"] | None = None
        self._read_settings, self._make_job = read_settings, make_job
        self._tokenizer = tokenizer
        self._context_length = context_length
        self._prefix: Prefix | None = None
        self._replies: dict[str, list[int]] = {}  # as they were made: text to ids is not unique
        self._read({})  # raises what is wrong with the settings, and then with the messages
        if self.history:
            read_turns(self.messages)

    @property
    def messages(self) -> list[dict[str, str]]:
        """A copy of the conversation, the system message among it: to save, or to render."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *(dict(message) for message in self.history)]

    def send(self, text: str, **settings: Any) -> str:
        """Say something; returns the reply, and keeps both in the history.

        Args:
            text: the user's message; what is written in it gives no control token.
            **settings: of generation, for this turn.

        Raises:
            ValueError: the context is full, `text` alone does not fit into it, or the history has
                been edited so that roles do not alternate. The history stays as it was.
            TypeError: `text` is no string, or a setting that is none.
        """
        return "".join(self.stream(text, **settings))

    def stream(self, text: str, **settings: Any) -> Iterator[str]:
        """Say something; yields the reply as it is made.

        Closing the iterator ends the reply; what has been said stays in the history.

        Args, Raises: as of `send`, before the first piece is asked for.
        """
        if not isinstance(text, str):
            raise TypeError(f"`text` must be a string. Received: text={text!r:.80}")
        given = self._read(settings)
        message = {"role": "user", "content": text}
        limit = min(self._context_length, given.max_length or self._context_length)
        most = None if given.max_new_tokens is None else given.room([0], None)[0]
        ids, dropped = self._fit(message, limit, most)
        room = min(most or limit, limit - len(ids))
        given = dataclasses.replace(given, max_length=None, max_new_tokens=room)
        job = self._make_job(ids, given, self._prefix)
        return self._speak(message, job, job.stream(), dropped)

    def undo(self) -> list[dict[str, str]]:
        """Take the last message of the user's, and the reply to it, out of the history.

        Returns:
            These messages; an empty list where there are none.
        """
        last = [i for i, message in enumerate(self.history) if message["role"] == "user"]
        start = last[-1] if last else len(self.history)
        undone = self.history[start:]
        del self.history[start:]
        return undone

    def clear(self) -> None:
        """Begin a new conversation, with the same system message."""
        self.history.clear()
        self.dropped.clear()

    def _read(self, settings: dict[str, Any]) -> GenerationSettings:
        given = self._read_settings({**self.settings, **settings})
        if given.num_return_sequences not in (None, 1) or given.top_log_probabilities is not None:
            raise ValueError(
                "A chat has one reply to a message, and it is text: use `generate_chat` with "
                "`num_return_sequences` or `return_logprobs`."
            )
        return given

    def _ids(self, messages: Sequence[Message]) -> list[int]:
        return self._tokenizer.encode_turns(read_turns(messages), replies=self._replies)

    def _fit(self, message: Message, limit: int, most: int | None) -> tuple[list[int], int]:
        """The prompt's ids, and how many messages are left out of it so that they fit.

        Args:
            limit: tokens of the conversation, one of a reply among them.
            most: of the reply; None for all that fit.
        """
        messages, dropped = [*self.messages, message], 0
        ids = self._ids(messages)
        if self.context_full == "drop_oldest":
            system = len(messages) - 1 - len(self.history)
            wanted = min(limit // SMALLEST_ROOM, most or limit)
            if limit - len(ids) < wanted:
                wanted = limit // ROOM_WHEN_DROPPED
                while limit - len(ids) < wanted and dropped + 2 <= len(self.history):
                    dropped += 2
                    ids = self._ids([*messages[:system], *messages[system + dropped :]])
        if limit - len(ids) < 1:
            remedy = "Make the message shorter"
            if self.history and not dropped:
                remedy = "Undo or clear turns, or make the chat with context_full='drop_oldest'"
            raise ValueError(
                f"The conversation has {len(ids)} tokens with this message, and the context holds "
                f"{limit}, one to generate among them. {remedy}."
            )
        return ids, dropped

    def _speak(
        self, message: dict[str, str], job: Job, stream: Iterator[str], dropped: int
    ) -> Iterator[str]:
        pieces: list[str] = []
        if dropped:
            warnings.warn(
                f"The context of {self._context_length} tokens is full: the oldest {dropped} "
                "messages were dropped.",
                stacklevel=3,
            )
        closed = False
        try:
            for piece in stream:
                pieces.append(piece)
                yield piece
        except GeneratorExit:
            closed = True
        # Where something else was raised, nothing was said.
        self.dropped += self.history[:dropped]
        del self.history[:dropped]
        self._keep(message, "".join(pieces), job, closed)

    def _keep(self, message: dict[str, str], reply: str, job: Job, closed: bool) -> None:
        """Note down a turn that is over."""
        self.history += [message, {"role": "assistant", "content": reply}]
        ids = job.new_ids()
        said = {message["content"].strip() for message in self.history}
        self._replies = {text: ids for text, ids in self._replies.items() if text in said}
        if job.text_of(ids) == reply:  # and not where it was cut at a stop string
            self._replies[reply.strip()] = ids
        self._prefix = job.run.prefix()
        self.prefilled_tokens = job.run.prefilled
        self.cached_tokens = len(job.request.prompts[0]) - job.run.prefilled
        self.new_tokens = len(job.run.new_ids()[0])
        stopped = "stop" if job.is_stopped() else "length"
        self.finish_reason = "closed" if closed and stopped != "stop" else stopped

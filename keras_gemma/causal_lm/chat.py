"""Multi-turn chat: message history and KV cache of a conversation.

Each turn is one `TextRequest`. Its prompt is the whole conversation, and its prefix cache holds
the tokens of the previous turns. Knows nothing about terminals.
"""

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from keras_gemma.causal_lm.prompts import Prompts
from keras_gemma.causal_lm.settings import GenerationSettings, read_settings
from keras_gemma.causal_lm.text_request import TextRequest
from keras_gemma.generation.request import Draft, PrefixCache
from keras_gemma.text.chat import Message, message_text, read_turns

MIN_REPLY_DIVISOR = 8
"""Divisor of the context length: with less than 1/8 free for a reply, turns are dropped."""

REPLY_DIVISOR_AFTER_DROP = 4
"""Divisor of the context length: dropping frees 1/4 of it. A smaller share would mean dropping
turns, and prefilling the remaining ones, almost every time."""

CONTEXT_FULL = ("error", "drop_oldest")


class Chat:
    """Multi-turn conversation, created by `GemmaCausalLM.chat`.

    Attributes:
        system: System message, or `None`. It can be changed at any time.
        history: List of messages `{"role": "user" | "assistant", "content": ...}`. It can be
            edited. The unchanged beginning is read from the KV cache, unless it is outside the
            sliding window.
        dropped: Messages that were dropped because the context was full, oldest first.
        prefilled_tokens: Number of prompt tokens processed in the last turn. `None` before the
            first turn, as are the next three.
        cached_tokens: Number of prompt tokens of the last turn that were read from the KV cache.
        new_tokens: Number of tokens generated in the last turn.
        finish_reason: `"stop"` after a stop token or stop string, `"length"` at the length limit,
            or `"closed"` if the stream was closed.

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
        lm: Any,
        system: str | None = None,
        history: Sequence[Message] = (),
        context_full: Literal["error", "drop_oldest"] = "error",
        draft: Draft | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        """Initializes a chat. Use `GemmaCausalLM.chat` instead.

        Args:
            lm: A `GemmaCausalLM` with a preprocessor.
            draft: Draft settings for speculative decoding.
            system, history, context_full, settings: Same as in `GemmaCausalLM.chat`.
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
        self._lm, self._draft = lm, draft
        self._tokenizer = lm.preprocessor.tokenizer
        self._context_length = lm.backbone.config.context_length
        self._prefix: PrefixCache | None = None
        self._replies: dict[str, list[int]] = {}  # The generated ids: retokenizing may differ.
        self._read({})  # checks the settings
        if self.history:
            read_turns(self.messages)

    def __repr__(self) -> str:
        last = f", last={self.history[-1]['content']!r:.60}" if self.history else ""
        return f"Chat(system={self.system!r:.60}, {len(self.history)} messages{last})"

    @property
    def messages(self) -> list[dict[str, str]]:
        """Copy of the conversation, including the system message."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *(dict(message) for message in self.history)]

    def send(self, text: str, **settings: Any) -> str:
        """Sends a message, returns the reply, and adds both to the history.

        Args:
            text: User message. Control tokens in it are treated as plain text.
            **settings: `GenerationSettings` for this turn.

        Raises:
            ValueError: If the context is full, `text` does not fit into the context, or roles in
                the history do not alternate. The history is unchanged.
            TypeError: If `text` is not a string or a setting is unknown.
        """
        return "".join(self.stream(text, **settings))

    def stream(self, text: str, **settings: Any) -> Iterator[str]:
        """Sends a message and yields the reply in pieces as soon as they are available.

        Closing the iterator stops generation; the partial reply is added to the history. Arguments
        and errors are the same as in `send`. Errors are raised by the call, before iteration.
        """
        if not isinstance(text, str):
            raise TypeError(f"`text` must be a string. Received: text={text!r:.80}")
        turn = self._read(settings)
        message = {"role": "user", "content": text}
        limit = min(self._context_length, turn.max_length or self._context_length)
        max_new_tokens = (
            None if turn.max_new_tokens is None else turn.max_new_tokens_of([0], None)[0]
        )
        ids, dropped = self._fit(message, limit, max_new_tokens)
        max_new_tokens = min(max_new_tokens or limit, limit - len(ids))
        turn = dataclasses.replace(turn, max_length=None, max_new_tokens=max_new_tokens)
        prompt = Prompts([np.array(ids, "int32")], texts=True, single=True)
        prefix = self._prefix
        if prefix is not None and not prefix.matches(self._lm.backbone):
            prefix = None  # The weights have changed.
        if self._lm.overrides_steps:
            raise ValueError(
                "A model that overrides `generate_step`, `call_with_cache` or `build_cache` "
                "generates whole texts: call `generate_chat` instead of a chat."
            )
        request = TextRequest(self._lm, prompt, turn, prefix, self._draft)
        return self._stream_reply(message, request, request.stream(), dropped)

    def undo(self) -> list[dict[str, str]]:
        """Removes the last user message and its reply from the history.

        Returns:
            The removed messages; an empty list if the history has no user message.
        """
        last = [i for i, message in enumerate(self.history) if message["role"] == "user"]
        start = last[-1] if last else len(self.history)
        undone = self.history[start:]
        del self.history[start:]
        return undone

    def clear(self) -> None:
        """Clears the history, but keeps the system message."""
        self.history.clear()
        self.dropped.clear()

    def _read(self, settings: dict[str, Any]) -> GenerationSettings:
        turn = read_settings({**self.settings, **settings}, "chat")
        turn = turn.with_defaults(self._lm.generation_settings)
        if turn.num_return_sequences not in (None, 1) or turn.top_logprobs is not None:
            raise ValueError(
                "A chat does not support `num_return_sequences` or `return_logprobs`. Use "
                "`generate_chat` with them."
            )
        return turn

    def _ids(self, messages: Sequence[Message]) -> list[int]:
        return self._tokenizer.encode_turns(read_turns(messages), replies=self._replies)

    def _fit(
        self, message: Message, limit: int, max_new_tokens: int | None
    ) -> tuple[list[int], int]:
        """Returns the prompt ids, and the number of old messages dropped to make them fit.

        Args:
            limit: Maximum number of tokens in the conversation, including the reply.
            max_new_tokens: Maximum number of tokens in the reply. `None` uses the whole context.
        """
        messages, dropped = [*self.messages, message], 0
        ids = self._ids(messages)
        if self.context_full == "drop_oldest":
            system = len(messages) - 1 - len(self.history)
            min_free = min(limit // MIN_REPLY_DIVISOR, max_new_tokens or limit)
            if limit - len(ids) < min_free:
                min_free = limit // REPLY_DIVISOR_AFTER_DROP
                while limit - len(ids) < min_free and dropped + 2 <= len(self.history):
                    dropped += 2
                    ids = self._ids([*messages[:system], *messages[system + dropped :]])
        if limit - len(ids) < 1:
            remedy = (
                "Make the message shorter, or use a model with a longer context, which "
                "`keras-gemma presets` lists"
            )
            if self.history and not dropped:
                remedy = "Undo or clear turns, or create the chat with context_full='drop_oldest'"
            raise ValueError(
                f"The conversation has {len(ids)} tokens with this message, but the limit is "
                f"{limit}, including at least one generated token. {remedy}."
            )
        return ids, dropped

    def _stream_reply(
        self, message: dict[str, str], request: TextRequest, stream: Iterator[str], dropped: int
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
        # After any other exception, the history is unchanged.
        self.dropped += self.history[:dropped]
        del self.history[:dropped]
        self._record_turn(message, "".join(pieces), request, closed)

    def _record_turn(
        self, message: dict[str, str], reply: str, request: TextRequest, closed: bool
    ) -> None:
        self.history += [message, {"role": "assistant", "content": reply}]
        ids = request.new_ids()
        texts = {message_text(message) for message in self.history}
        self._replies = {text: ids for text, ids in self._replies.items() if text in texts}
        if request.text_of(ids) == reply:  # False if it was cut at a stop string.
            self._replies[reply.strip()] = ids
        self._prefix = request.session.prefix()
        self.prefilled_tokens = request.session.prefilled_tokens
        self.cached_tokens = (
            len(request.token_request.prompts[0]) - request.session.prefilled_tokens
        )
        self.new_tokens = len(request.session.new_ids()[0])
        reason = "stop" if request.is_stopped() else "length"
        self.finish_reason = "closed" if closed and reason != "stop" else reason

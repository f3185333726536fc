"""What a model that talks has beside `generate` and `stream`: `chat` and `generate_chat`."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from keras_gemma.causal_lm.chat import Chat
from keras_gemma.causal_lm.prompts import Prompts, require_preprocessor
from keras_gemma.causal_lm.settings import GenerationSettings
from keras_gemma.causal_lm.text_request import Job
from keras_gemma.generation.request import Prefix
from keras_gemma.text.chat import Message


class Conversational:
    """A base of models with a `preprocessor`, a `backbone`, `_settings`, `_draft` and `_job`."""

    def chat(
        self,
        system: str | None = None,
        context_full: Literal["error", "drop_oldest"] = "error",
        *,
        history: Sequence[Message] = (),
        draft: Any = None,
        num_draft_tokens: int | None = None,
        **settings: Any,
    ) -> Chat:
        """Begin a conversation. A turn reads its own tokens alone: the others stay in the cache.

        Models that are not tuned for turns continue the text of the conversation as any other.

        Args:
            system: a message that stands at the head of the first user turn, for Gemma knows no
                system role.
            context_full: what to do where the conversation has no room for another reply:
                `"error"` raises one; `"drop_oldest"` forgets the oldest turns until a quarter of
                the context is free, and warns. The system message stays.
            history: messages that have been said, `{"role", "content"}` each.
            draft, num_draft_tokens: as of `generate`.
            **settings: of generation, for all turns. A reply has as many tokens as
                `max_new_tokens` and the context allow.

        Raises:
            ValueError: roles that do not alternate, settings out of range, no preprocessor.
            TypeError: messages that are none, or a setting that is none.

        Example:

        ```python
        import keras_gemma

        lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
        chat = lm.chat(max_new_tokens=20)
        print(chat.send("Who's there?"))
        print(chat.history)
        ```
        """
        require_preprocessor(self.preprocessor, "one: a chat is text")
        guesses = self._draft(draft, num_draft_tokens)

        def read_settings(given: dict[str, Any]) -> GenerationSettings:
            length, stops = given.pop("max_length", None), given.pop("stop_token_ids", "auto")
            return self._settings("chat", length, stops, given)

        def make_job(ids: list[int], given: GenerationSettings, prefix: Prefix | None) -> Job:
            if prefix is not None and not prefix.is_of(self.backbone):  # trained in between
                prefix = None
            prompt = Prompts([np.array(ids, "int32")], texts=True, single=True)
            return self._job(prompt, given, prefix, guesses)

        return Chat(
            read_settings,
            make_job,
            self.preprocessor.tokenizer,
            self.backbone.config.context_length,
            system,
            history,
            context_full,
            settings,
        )

    def generate_chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        max_length: int | None = None,
        stop_token_ids: Any = "auto",
        *,
        prefix: Prefix | None = None,
        draft: Any = None,
        num_draft_tokens: int | None = None,
        **settings: Any,
    ) -> Any:
        """The reply to a conversation, or to each of a batch of them.

        Args:
            messages: `{"role", "content"}` each, as of `GemmaTokenizer.apply_chat_template`; or a
                list of such lists.
            max_length, stop_token_ids, prefix, draft, num_draft_tokens, **settings: as of
                `generate`.

        Returns:
            The reply, a string; for a batch, a list of them. With `num_return_sequences` above 1,
            a list for each conversation; with `return_logprobs`, `Completion`s.

        Raises:
            ValueError, TypeError: as of `apply_chat_template` and `generate`.

        Example:

        ```python
        import keras_gemma

        lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
        messages = [{"role": "user", "content": "Who's there?"}]
        lm.generate_chat(messages, max_new_tokens=20)
        lm.generate_chat([messages, messages], max_new_tokens=20, temperature=0.8, seed=1)
        ```
        """
        require_preprocessor(self.preprocessor, "token ids to `generate`: messages are text")
        given = self._settings("generate_chat", max_length, stop_token_ids, settings)
        ids = self.preprocessor.tokenizer.apply_chat_template(messages)
        single = isinstance(ids[0], int)
        rows = [np.array(row, "int32") for row in ([ids] if single else ids)]
        prompts = Prompts(rows, texts=True, single=single)
        guesses = self._draft(draft, num_draft_tokens)
        return self._job(prompts, given, prefix, guesses).complete(strip_prompt=True)

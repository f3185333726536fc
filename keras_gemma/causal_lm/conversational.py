"""Chat methods of the model: `chat` and `generate_chat`."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from keras_gemma.causal_lm.chat import Chat
from keras_gemma.causal_lm.prompts import Prompts, require_preprocessor
from keras_gemma.causal_lm.settings import GenerationSettings
from keras_gemma.causal_lm.text_request import TextRequest
from keras_gemma.generation.request import PrefixCache
from keras_gemma.text.chat import Message


class Conversational:
    """Mixin that adds chat methods to `GemmaCausalLM`."""

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
        """Starts a chat whose turns reuse the KV cache of the previous turns.

        Models without instruction tuning simply continue the text of the conversation.

        Args:
            system: System message. It is prepended to the first user turn, because Gemma has no
                system role.
            context_full: Action when the context is too full for another reply. `"error"` raises
                an error. `"drop_oldest"` warns and drops the oldest turns until a quarter of the
                context is free; the system message is kept.
            history: Previous messages, as dicts `{"role", "content"}`.
            draft, num_draft_tokens: Same as in `generate`.
            **settings: `GenerationSettings` for all turns. The length of a reply is limited by
                `max_new_tokens` and by the context length.

        Raises:
            ValueError: If roles do not alternate, a setting is out of range, or the model has no
                preprocessor.
            TypeError: If a message is malformed or a setting is unknown.

        Example:

        ```python
        import keras_gemma

        lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
        chat = lm.chat(max_new_tokens=20)
        print(chat.send("Who's there?"))
        print(chat.history)
        ```
        """
        require_preprocessor(self.preprocessor, "a chat", None)
        draft = self._draft(draft, num_draft_tokens)

        def read_settings(settings: dict[str, Any]) -> GenerationSettings:
            max_length = settings.pop("max_length", None)
            stop_token_ids = settings.pop("stop_token_ids", "auto")
            return self._settings("chat", max_length, stop_token_ids, settings)

        def make_request(
            ids: list[int], settings: GenerationSettings, prefix: PrefixCache | None
        ) -> TextRequest:
            if prefix is not None and not prefix.matches(
                self.backbone
            ):  # The weights have changed.
                prefix = None
            prompt = Prompts([np.array(ids, "int32")], texts=True, single=True)
            return self._text_request(prompt, settings, prefix, draft)

        return Chat(
            read_settings,
            make_request,
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
        prefix: PrefixCache | None = None,
        draft: Any = None,
        num_draft_tokens: int | None = None,
        **settings: Any,
    ) -> Any:
        """Generates the reply to a conversation, or to each conversation of a batch.

        Args:
            messages: A list of dicts `{"role", "content"}`, as for
                `GemmaTokenizer.apply_chat_template`, or a list of such lists.
            max_length, stop_token_ids, prefix, draft, num_draft_tokens, **settings: Same as in
                `generate`.

        Returns:
            The reply as a string; for a batch, a list of replies. If `num_return_sequences` is
            above 1, each conversation gets a list. With `return_logprobs`, each reply is a
            `Completion`.

        Raises:
            ValueError, TypeError: Same as in `apply_chat_template` and `generate`.

        Example:

        ```python
        import keras_gemma

        lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
        messages = [{"role": "user", "content": "Who's there?"}]
        lm.generate_chat(messages, max_new_tokens=20)
        lm.generate_chat([messages, messages], max_new_tokens=20, temperature=0.8, seed=1)
        ```
        """
        require_preprocessor(self.preprocessor, "`generate_chat`", "Pass token ids to `generate`")
        call_settings = self._settings("generate_chat", max_length, stop_token_ids, settings)
        ids = self.preprocessor.tokenizer.apply_chat_template(messages)
        single = isinstance(ids[0], int)
        rows = [np.array(row, "int32") for row in ([ids] if single else ids)]
        prompts = Prompts(rows, texts=True, single=single)
        draft = self._draft(draft, num_draft_tokens)
        request = self._text_request(prompts, call_settings, prefix, draft)
        return request.complete(strip_prompt=True)

"""Who guesses tokens ahead: a smaller model, or the text itself."""

from typing import Any

import numpy as np

from keras_gemma.generation.request import Draft

NUM_DRAFT_TOKENS = 4
"""How many tokens a draft guesses at a time, where nothing is said."""


def read_draft(draft: Any, tokens: int | None, model_cls: type) -> Draft | None:
    """The arguments `draft` and `num_draft_tokens` of `generate`.

    Args:
        model_cls: the class of models that can be a draft.

    Raises:
        TypeError: neither a model nor "prompt".
        ValueError: a number of tokens without a draft.
    """
    if draft is None:
        if tokens is not None:
            raise ValueError(
                "`num_draft_tokens` is how many tokens a `draft` guesses: pass one, such as "
                f"draft='prompt', or leave it out. Received: num_draft_tokens={tokens!r}"
            )
        return None
    count = NUM_DRAFT_TOKENS if tokens is None else tokens
    count = int(count) if isinstance(count, np.integer) else count
    if isinstance(draft, str) and draft == "prompt":
        return Draft(count)
    if isinstance(draft, model_cls):
        tokenizer = draft.preprocessor and draft.preprocessor.tokenizer
        return Draft(count, draft._generator(), tokenizer)
    raise TypeError(
        "`draft` must be a GemmaCausalLM, or 'prompt' to guess from the text itself. "
        f"Received: draft={draft!r:.80}"
    )

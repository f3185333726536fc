"""Draft arguments of `generate`: a smaller model, or the prompt itself."""

from typing import Any

import numpy as np

from keras_gemma.generation.programs import Programs
from keras_gemma.generation.request import Draft

NUM_DRAFT_TOKENS = 4
"""Default number of draft tokens per verification."""


def read_draft(draft: Any, tokens: int | None) -> Draft | None:
    """Returns the draft settings for the `draft` and `num_draft_tokens` of `generate`.

    Raises:
        TypeError: If `draft` is neither a model nor `"prompt"`.
        ValueError: If `num_draft_tokens` is passed without a `draft`.
    """
    if draft is None:
        if tokens is not None:
            raise ValueError(
                "`num_draft_tokens` requires a `draft`. Pass one, such as draft='prompt', or leave "
                f"it out. Received: num_draft_tokens={tokens!r}"
            )
        return None
    count = NUM_DRAFT_TOKENS if tokens is None else tokens
    count = int(count) if isinstance(count, np.integer) else count
    if isinstance(draft, str) and draft == "prompt":
        return Draft(count)
    if isinstance(getattr(draft, "programs", None), Programs):
        tokenizer = draft.preprocessor and draft.preprocessor.tokenizer
        return Draft(count, draft.programs, tokenizer)
    raise TypeError(
        "`draft` must be a GemmaCausalLM, or 'prompt' for prompt-lookup decoding. "
        f"Received: draft={draft!r:.80}"
    )

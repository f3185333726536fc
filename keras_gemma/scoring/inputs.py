"""What is to be scored, in every form that callers have, checked and as arrays.

Knows the sizes of a model, and none of its weights.
"""

from typing import Any, NamedTuple

import numpy as np

from keras_gemma.config import GemmaConfig
from keras_gemma.text.batches import is_text
from keras_gemma.text.preprocessor import GemmaCausalLMPreprocessor
from keras_gemma.text.reading import pad_rows, to_ids, to_numpy


class Inputs(NamedTuple):
    """Texts as arrays `[B, T]` on the host."""

    token_ids: np.ndarray  # int32
    mask: np.ndarray  # bool, false at padding
    target_ids: np.ndarray | None  # int32
    counted: np.ndarray | None = None  # bool, false where there is nothing to predict


def read_inputs(
    token_ids: Any,
    padding_mask: Any,
    target_ids: Any,
    preprocessor: GemmaCausalLMPreprocessor | None,
    config: GemmaConfig,
) -> Inputs:
    """The arguments of `score`, which says what they are.

    Raises:
        ValueError, TypeError: they are something else.
    """
    if holds_text(token_ids):
        if padding_mask is not None or target_ids is not None:
            raise ValueError(
                "Strings bring their own `padding_mask` and `target_ids`, the ids that follow: "
                "leave both out, or pass ids in the place of strings."
            )
        inputs = encode(token_ids, preprocessor)
        check_length(inputs, config)
        return inputs
    size = config.vocabulary_size
    token_ids = to_ids("token_ids", token_ids, 2, size)
    if padding_mask is None:
        padding_mask = np.ones(token_ids.shape, "bool")
    mask = to_numpy(padding_mask)
    if target_ids is not None:
        target_ids = to_ids("target_ids", target_ids, 2, size)
    for name, array in (("padding_mask", mask), ("target_ids", target_ids)):
        if array is not None and array.shape != token_ids.shape:
            raise ValueError(
                f"`{name}` must have the shape of `token_ids`. Received: {name} of shape "
                f"{array.shape}, token_ids of shape {token_ids.shape}"
            )
    if not token_ids.size:
        raise ValueError(
            f"`token_ids` must hold a token at least. Received: shape {token_ids.shape}"
        )
    inputs = Inputs(token_ids, mask.astype("bool"), target_ids)
    check_length(inputs, config)
    return inputs


def check_length(inputs: Inputs, config: GemmaConfig) -> None:
    """Raise a ValueError where a text is longer than the model's context."""
    longest = int(inputs.mask.sum(1).max())
    if longest > config.context_length:
        raise ValueError(
            f"A text must fit into the model's context of {config.context_length} tokens. Cut it, "
            "or let `perplexity` slide over it in windows. "
            f"Received: token_ids with a text of {longest} tokens"
        )


def holds_text(x: Any) -> bool:
    """Whether `x` is a string, or a list or an array of strings."""
    if is_text(x):
        return True
    many = isinstance(x, list | tuple) or getattr(x, "ndim", None) == 1
    return many and len(x) > 0 and is_text(x[0])


def encode(texts: Any, preprocessor: GemmaCausalLMPreprocessor | None) -> Inputs:
    """One string or several, with `<bos>`, padded at their ends to the longest.

    Targets are the tokens that follow; none follows the last.
    """
    if preprocessor is None:
        raise ValueError(
            "This model has no preprocessor: pass `token_ids` as ids [batch, tokens], or make it "
            f"with `GemmaCausalLM(backbone, preprocessor)`. Received: {texts!r:.80}"
        )
    rows = preprocessor.tokenize_prompts([texts] if is_text(texts) else list(texts))
    pad_id = preprocessor.tokenizer.pad_token_id
    token_ids, mask = pad_rows(rows, max(map(len, rows)), pad_id)
    follows = np.roll(mask, -1, axis=1)
    follows[:, -1] = False
    return Inputs(token_ids, mask, np.roll(token_ids, -1, axis=1), follows)


def encode_one(lm: Any, text: Any, argument: str = "text") -> np.ndarray:
    """One text, a string or its ids, as int32 `[T]` that fits into the context of `lm`.

    Raises:
        ValueError, TypeError: several texts, none, or one too long.
    """
    config = lm.backbone.config
    if is_text(text):
        return read_inputs(text, None, None, lm.preprocessor, config).token_ids[0]
    if holds_text(text):
        raise TypeError(f"`{argument}` must be one string, or its ids. Received: {text!r:.80}")
    ids = to_ids(argument, text, 1, config.vocabulary_size)
    return read_inputs(ids[None], None, None, None, config).token_ids[0]


def tokens_of(lm: Any, ids: np.ndarray) -> list[str]:
    """How each id is written, for a picture: its piece, or its number without a vocabulary."""
    if lm.preprocessor is None:
        return [str(id) for id in ids]
    return [lm.preprocessor.tokenizer.id_to_token(int(id)) for id in ids]

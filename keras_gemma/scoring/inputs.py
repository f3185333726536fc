"""Inputs of scoring: validation, and conversion to arrays.

Knows the sizes of a model, but not its weights.
"""

from typing import Any, NamedTuple

import numpy as np

from keras_gemma.checks import check_integer
from keras_gemma.config import GemmaConfig
from keras_gemma.text.batches import holds_strings, is_text
from keras_gemma.text.inputs import pad_rows, to_ids, to_numpy
from keras_gemma.text.preprocessor import GemmaCausalLMPreprocessor, require_preprocessor


class Inputs(NamedTuple):
    """Texts as arrays `[B, T]` on the host."""

    token_ids: np.ndarray  # int32
    mask: np.ndarray  # bool, false at padding
    target_ids: np.ndarray | None  # int32
    counted: np.ndarray | None = None  # bool, false at positions without a target


def read_inputs(
    token_ids: Any,
    padding_mask: Any,
    target_ids: Any,
    preprocessor: GemmaCausalLMPreprocessor | None,
    config: GemmaConfig,
) -> Inputs:
    """Checks and converts the arguments of `GemmaCausalLM.score`.

    Raises:
        ValueError: If an argument has an invalid value or shape.
        TypeError: If an argument has an invalid type.
    """
    if is_text(token_ids) or holds_strings(token_ids):
        if padding_mask is not None or target_ids is not None:
            raise ValueError(
                "`padding_mask` and `target_ids` are derived from strings: leave both out, or pass "
                "token ids instead of strings."
            )
        inputs = encode(token_ids, preprocessor)
        check_length("token_ids", inputs.mask.sum(1).max(), config)
        return inputs
    size = config.vocabulary_size
    token_ids = to_ids("token_ids", token_ids, 2, size)
    mask = read_mask(padding_mask, token_ids.shape)
    if target_ids is not None:
        target_ids = to_ids("target_ids", target_ids, 2, size)
        check_shape("target_ids", target_ids, token_ids.shape)
    if not token_ids.size:
        raise ValueError(
            f"`token_ids` must have at least one token. Received: shape {token_ids.shape}"
        )
    check_length("token_ids", mask.sum(1).max(), config)
    return Inputs(token_ids, mask, target_ids)


def read_mask(padding_mask: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the mask as bool `[B, T]`. `None` means no padding."""
    if padding_mask is None:
        return np.ones(shape, "bool")
    try:
        mask = to_numpy(padding_mask)
    except ValueError as error:
        raise ValueError(
            f"`padding_mask` must have rows of equal length. Received: {padding_mask!r:.200}"
        ) from error
    check_shape("padding_mask", mask, shape)
    if not np.isin(mask, (0, 1)).all():
        raise ValueError(
            "`padding_mask` must be 1 or True at tokens and 0 or False at padding. "
            f"Received: padding_mask={mask!r:.200}"
        )
    return mask.astype("bool")


def check_shape(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    """Raises a ValueError if the argument `name` does not have the shape of `token_ids`."""
    if array.shape != shape:
        raise ValueError(
            f"`{name}` must have the shape of `token_ids`. Received: {name} of shape "
            f"{array.shape}, token_ids of shape {shape}"
        )


def check_length(name: str, longest: int, config: GemmaConfig) -> None:
    """Raises a ValueError if a text is longer than the model's context."""
    if longest > config.context_length:
        raise ValueError(
            f"A text must fit into the model's context of {config.context_length} tokens. Shorten "
            "it, or use `perplexity`, which reads it in sliding windows. "
            f"Received: a text of {longest} tokens in `{name}`"
        )


def encode(texts: Any, preprocessor: GemmaCausalLMPreprocessor | None) -> Inputs:
    """Tokenizes one string or several, with `<bos>`, and pads them on the right.

    The target of each token is the next token; the last token has no target.
    """
    require_preprocessor(preprocessor)
    rows = preprocessor.tokenize_prompts([texts] if is_text(texts) else list(texts))
    pad_id = preprocessor.tokenizer.pad_token_id
    token_ids, mask = pad_rows(rows, max(map(len, rows)), pad_id)
    follows = np.roll(mask, -1, axis=1)
    follows[:, -1] = False
    return Inputs(token_ids, mask, np.roll(token_ids, -1, axis=1), follows)


def encode_one(lm: Any, text: Any, name: str = "text") -> np.ndarray:
    """Converts one text of any length, a string or its ids, to int32 `[T]`.

    Args:
        lm: A `GemmaCausalLM`.
        text: The text.
        name: Name of the argument, for error messages.

    Raises:
        ValueError: If the text is empty or an id is invalid.
        TypeError: If there are several texts.
    """
    if is_text(text):
        return encode(text, lm.preprocessor).token_ids[0]
    if holds_strings(text):
        raise TypeError(f"`{name}` must be one string, or token ids. Received: {text!r:.80}")
    ids = to_ids(name, text, 1, lm.backbone.config.vocabulary_size)
    if not ids.size:
        raise ValueError(f"`{name}` must have at least one token. Received: {text!r:.80}")
    return ids


def encode_short(lm: Any, text: Any, name: str = "text") -> np.ndarray:
    """Same as `encode_one`, but raises a ValueError if the text exceeds the context of `lm`."""
    ids = encode_one(lm, text, name)
    check_length(name, len(ids), lm.backbone.config)
    return ids


def read_integer(
    name: str, value: Any, minimum: int, maximum: int | None = None, advice: str = ""
) -> int:
    """Same as `check_integer`, but accepts arrays of rank 0 too, and returns an int."""
    number = to_numpy(value)[()] if getattr(value, "ndim", None) == 0 else value
    check_integer(name, number, minimum, maximum, advice)
    return int(number)


def tokens_of(lm: Any, ids: np.ndarray) -> list[str]:
    """Returns the string of each id: its token, or its number if the model has no vocabulary."""
    if lm.preprocessor is None:
        return [str(id) for id in ids]
    return [lm.preprocessor.tokenizer.id_to_token(int(id)) for id in ids]

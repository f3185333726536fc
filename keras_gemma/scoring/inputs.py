"""What is to be scored, in every form that callers have, checked and as arrays.

Knows the sizes of a model, and none of its weights.
"""

from typing import Any, NamedTuple

import numpy as np

from keras_gemma.config import GemmaConfig
from keras_gemma.text.batches import is_text
from keras_gemma.text.inputs import pad_rows, to_ids, to_numpy
from keras_gemma.text.preprocessor import GemmaCausalLMPreprocessor


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
            f"`token_ids` must hold a token at least. Received: shape {token_ids.shape}"
        )
    check_length("token_ids", mask.sum(1).max(), config)
    return Inputs(token_ids, mask, target_ids)


def read_mask(padding_mask: Any, shape: tuple[int, ...]) -> np.ndarray:
    """As bool `[B, T]`; no padding where it is None."""
    if padding_mask is None:
        return np.ones(shape, "bool")
    try:
        mask = to_numpy(padding_mask)
    except ValueError as error:
        raise ValueError(
            f"`padding_mask` must have rows of one length. Received: {padding_mask!r:.200}"
        ) from error
    check_shape("padding_mask", mask, shape)
    if not np.isin(mask, (0, 1)).all():
        raise ValueError(
            "`padding_mask` must be 1 or True at tokens, and 0 or False at padding. "
            f"Received: padding_mask={mask!r:.200}"
        )
    return mask.astype("bool")


def check_shape(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    """Raise a ValueError where the argument `name` has another shape than `token_ids`."""
    if array.shape != shape:
        raise ValueError(
            f"`{name}` must have the shape of `token_ids`. Received: {name} of shape "
            f"{array.shape}, token_ids of shape {shape}"
        )


def check_length(name: str, longest: int, config: GemmaConfig) -> None:
    """Raise a ValueError where a text is longer than the model's context."""
    if longest > config.context_length:
        raise ValueError(
            f"A text must fit into the model's context of {config.context_length} tokens. Cut it, "
            "or let `perplexity` slide over it in windows. "
            f"Received: a text of {longest} tokens in `{name}`"
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


def encode_one(lm: Any, text: Any, name: str = "text") -> np.ndarray:
    """One text of any length, a string or its ids, as int32 `[T]`.

    Raises:
        ValueError, TypeError: several texts, or none; `name` is the argument.
    """
    if is_text(text):
        return encode(text, lm.preprocessor).token_ids[0]
    if holds_text(text):
        raise TypeError(f"`{name}` must be one string, or its ids. Received: {text!r:.80}")
    ids = to_ids(name, text, 1, lm.backbone.config.vocabulary_size)
    if not ids.size:
        raise ValueError(f"`{name}` must hold a token at least. Received: {text!r:.80}")
    return ids


def encode_short(lm: Any, text: Any, name: str = "text") -> np.ndarray:
    """`encode_one`, or a ValueError where the text does not fit into the context of `lm`."""
    ids = encode_one(lm, text, name)
    check_length(name, len(ids), lm.backbone.config)
    return ids


def whole_number(name: str, value: Any, lowest: int, highest: float, remark: str = "") -> int:
    """`value` as an int, or a ValueError where it is none in [lowest, highest].

    Args:
        remark: what an error says behind these bounds.
    """
    number = to_numpy(value)[()] if getattr(value, "ndim", None) == 0 else value
    is_whole = isinstance(number, int | np.integer) and not isinstance(number, bool)
    if not is_whole or not lowest <= number <= highest:
        bounds = f"in [{lowest}, {highest}]" if highest < np.inf else f"of {lowest} at least"
        raise ValueError(
            f"`{name}` must be an integer {bounds}{remark}. Received: {name}={value!r:.80}"
        )
    return int(number)


def tokens_of(lm: Any, ids: np.ndarray) -> list[str]:
    """How each id is written, for a picture: its piece, or its number without a vocabulary."""
    if lm.preprocessor is None:
        return [str(id) for id in ids]
    return [lm.preprocessor.tokenizer.id_to_token(int(id)) for id in ids]

"""Prompts in every form that callers have: read, and answered in kind."""

import dataclasses
from typing import Any

import numpy as np

from keras_gemma.text.batches import is_text
from keras_gemma.text.inputs import to_ids, to_numpy
from keras_gemma.text.preprocessor import GemmaCausalLMPreprocessor


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts as ids, and the form that they came in."""

    ids: list[np.ndarray]
    """int32 `[T]` each."""
    texts: bool
    """They were strings."""
    single: bool = False
    """It was one string."""
    width: int | None = None
    """Of a padded array `[B, width]`; None for anything else."""

    def answer(self, rows: list[Any], copies: int) -> Any:
        """`rows`, `copies` to a prompt, in the shape that the prompts had.

        A list for each prompt where more than one copy was asked for.
        """
        if copies > 1:
            rows = [rows[i : i + copies] for i in range(0, len(rows), copies)]
        return rows[0] if self.single else rows

    def pad(self, rows: list[np.ndarray]) -> dict[str, np.ndarray]:
        """`{"token_ids", "padding_mask"}` of the prompts' shape, with `rows` at the start."""
        token_ids = np.zeros((len(rows), self.width), "int32")
        mask = np.zeros(token_ids.shape, "bool")
        for i, row in enumerate(rows):
            token_ids[i, : len(row)] = row
            mask[i, : len(row)] = True
        return {"token_ids": token_ids, "padding_mask": mask}


def read_prompts(
    inputs: Any,
    preprocessor: GemmaCausalLMPreprocessor | None,
    vocabulary_size: int,
    name: str = "inputs",
) -> Prompts:
    """One batch of prompts, in whatever form.

    Args:
        inputs: a string, or a list of strings; ids as a list of lists, or as
            `{"token_ids", "padding_mask"}`.
        preprocessor: of the strings.
        vocabulary_size: what ids must be below.
        name: of the argument, for an error.

    Raises:
        TypeError, ValueError: no prompts.
    """
    if isinstance(inputs, dict):
        return _read_padded(inputs, vocabulary_size)
    if not (is_text(inputs) or isinstance(inputs, list | tuple) or hasattr(inputs, "ndim")):
        more = ", or a `tf.data.Dataset` of them" if name == "inputs" else ""
        raise TypeError(
            f"`{name}` must be a string, a list of strings or of lists of ids, or a dict of "
            f"arrays{more}. Received: {inputs!r:.200}"
        )
    texts = inputs if is_text(inputs) else list(inputs)
    single = is_text(texts)
    if single:
        texts = [texts]
    if texts and is_text(texts[0]):
        require_preprocessor(preprocessor)
        return Prompts(preprocessor.tokenize_prompts(texts), True, single)
    if any(np.ndim(ids) == 0 and not is_text(ids) for ids in texts):
        raise ValueError(
            f"Ids of `{name}` must come in a batch: pass a list of lists of ids, or an array "
            f"[batch, tokens]. Received: {inputs!r:.80}"
        )
    ids = [to_ids(f"{name}[{i}]", ids, 1, vocabulary_size) for i, ids in enumerate(texts)]
    return Prompts(ids, False)


def read_prompt(
    inputs: Any, preprocessor: GemmaCausalLMPreprocessor | None, vocabulary_size: int
) -> np.ndarray:
    """The ids of one prompt, int32 `[T]`: a string, or a list of ids.

    Raises:
        TypeError, ValueError: anything else, several prompts among it.
    """
    if is_text(inputs):
        (ids,) = read_prompts(inputs, preprocessor, vocabulary_size).ids
        return ids
    if isinstance(inputs, dict) or not (isinstance(inputs, list | tuple) or np.ndim(inputs)):
        raise TypeError(f"`inputs` must be a string, or a list of ids. Received: {inputs!r:.200}")
    if any(is_text(item) or np.ndim(item) for item in inputs):
        raise ValueError(
            "`inputs` must be one text, a string or a list of ids: read several one by one. "
            f"Received: {inputs!r:.200}"
        )
    return to_ids("inputs", inputs, 1, vocabulary_size)


def _read_padded(inputs: dict[str, Any], vocabulary_size: int) -> Prompts:
    """Ids in `[B, S]`, as `generate_preprocess` gives them."""
    missing = {"token_ids", "padding_mask"} - set(inputs)
    if missing:
        raise ValueError(
            'A dict of inputs must hold "token_ids" and "padding_mask", both [batch, tokens]. '
            f"Missing: {sorted(missing)}. Received keys: {sorted(inputs)}"
        )
    token_ids = to_ids("token_ids", inputs["token_ids"], 2, vocabulary_size)
    mask = to_numpy(inputs["padding_mask"]).astype("bool")
    if token_ids.shape != mask.shape:
        raise ValueError(
            '"token_ids" and "padding_mask" must both be [batch, tokens]. Received: '
            f"{token_ids.shape} and {mask.shape}"
        )
    lengths = mask.sum(1)
    if (mask != (np.arange(mask.shape[1]) < lengths[:, None])).any():
        raise ValueError(
            '"padding_mask" must be true from the start of each row to the end of its prompt: '
            "put padding behind the prompt."
        )
    rows = [row[:length] for row, length in zip(token_ids, lengths, strict=True)]
    return Prompts(rows, False, width=mask.shape[1])


def room_in_padding(prompts: Prompts, max_length: int | None, most: list[int] | None) -> list[int]:
    """The new tokens that fit into each row of padded prompts.

    Args:
        max_length: a shorter end than that of the rows, or None.
        most: the most of each row, or None.
    """
    end = min(prompts.width, max_length or prompts.width)
    lengths = [len(row) for row in prompts.ids]
    full = [i for i, length in enumerate(lengths) if length >= end]
    if full:
        raise ValueError(
            f"Rows {full} have no room to generate: pad them to the length that is wanted, "
            f"prompt included, and let no `max_length` be shorter. Received: {end} tokens"
        )
    most = most or [end] * len(lengths)
    return [min(end - length, limit) for length, limit in zip(lengths, most, strict=True)]


def require_preprocessor(preprocessor: Any, otherwise: str = "token ids") -> None:
    """Raise a ValueError where there is none; `otherwise` is what would do instead."""
    if preprocessor is None:
        raise ValueError(
            f"This model has no preprocessor: give {otherwise}, or make it with "
            "`GemmaCausalLM(backbone, preprocessor)`."
        )

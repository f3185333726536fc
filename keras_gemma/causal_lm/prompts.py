"""Conversion of prompts in all accepted formats to token ids, and of outputs back."""

import dataclasses
from typing import Any

import numpy as np

from keras_gemma.text.batches import is_text
from keras_gemma.text.inputs import pad_rows, to_ids, to_numpy
from keras_gemma.text.preprocessor import GemmaCausalLMPreprocessor, require_preprocessor


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts as token ids, with their original format."""

    ids: list[np.ndarray]
    """Token ids of each prompt, int32 `[T]`."""
    texts: bool
    """True if the prompts were strings."""
    single: bool = False
    """True if the prompt was a single string."""
    width: int | None = None
    """Width of a padded array `[B, width]`. `None` for all other formats."""

    def answer(self, rows: list[Any], num_return_sequences: int) -> Any:
        """Returns the outputs in the structure of the prompts.

        Args:
            rows: Outputs, with the sequences of one prompt next to each other.
            num_return_sequences: Sequences per prompt. If above 1, each prompt gets a list.
        """
        if num_return_sequences > 1:
            starts = range(0, len(rows), num_return_sequences)
            rows = [rows[i : i + num_return_sequences] for i in starts]
        return rows[0] if self.single else rows

    def pad(self, rows: list[np.ndarray]) -> dict[str, np.ndarray]:
        """Returns `rows` padded to `[B, width]`, as `{"token_ids", "padding_mask"}`."""
        token_ids, mask = pad_rows(rows, self.width, pad_id=0)
        return {"token_ids": token_ids, "padding_mask": mask}


def read_prompts(
    inputs: Any,
    preprocessor: GemmaCausalLMPreprocessor | None,
    vocabulary_size: int,
    name: str = "inputs",
) -> Prompts:
    """Converts one batch of prompts to token ids.

    Args:
        inputs: A string, a list of strings, a list of lists of token ids, or a dict: of arrays
            `{"token_ids", "padding_mask"}`, or `{"prompts": ...}` as in KerasHub's Gemma 3.
        preprocessor: Preprocessor for strings.
        vocabulary_size: Upper bound of the ids, exclusive.
        name: Name of the argument, for error messages.

    Raises:
        TypeError, ValueError: If `inputs` has another format or invalid ids.
    """
    if isinstance(inputs, dict) and "prompts" in inputs:
        others = sorted(inputs.keys() - {"prompts", "responses"})
        if others:
            raise ValueError(
                f"`{name}` must have the key 'prompts' only, because the models read text. "
                f"Received: {', '.join(map(repr, others))}"
            )
        inputs = inputs["prompts"]
    if isinstance(inputs, dict):
        return _read_padded(inputs, vocabulary_size)
    if not (is_text(inputs) or isinstance(inputs, list | tuple) or hasattr(inputs, "ndim")):
        dataset = ", or a `tf.data.Dataset` of them" if name == "inputs" else ""
        raise TypeError(
            f"`{name}` must be a string, a list of strings or of lists of ids, or a dict of "
            f"arrays{dataset}. Received: {inputs!r:.200}"
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
            f"Ids of `{name}` must be a batch: pass a list of lists of ids, or an array "
            f"[batch, tokens]. Received: {inputs!r:.80}"
        )
    ids = [to_ids(f"{name}[{i}]", ids, 1, vocabulary_size) for i, ids in enumerate(texts)]
    return Prompts(ids, False)


def read_prompt(
    inputs: Any, preprocessor: GemmaCausalLMPreprocessor | None, vocabulary_size: int
) -> np.ndarray:
    """Converts one prompt, a string or a list of token ids, to int32 `[T]`.

    Raises:
        TypeError, ValueError: If `inputs` has another format or contains several prompts.
    """
    if is_text(inputs):
        (ids,) = read_prompts(inputs, preprocessor, vocabulary_size).ids
        return ids
    if isinstance(inputs, dict) or not (isinstance(inputs, list | tuple) or np.ndim(inputs)):
        raise TypeError(f"`inputs` must be a string, or a list of ids. Received: {inputs!r:.200}")
    if any(is_text(item) or np.ndim(item) for item in inputs):
        raise ValueError(
            "`inputs` must be one text, a string or a list of ids. Call `prefill` once per text. "
            f"Received: {inputs!r:.200}"
        )
    return to_ids("inputs", inputs, 1, vocabulary_size)


def _read_padded(inputs: dict[str, Any], vocabulary_size: int) -> Prompts:
    """Reads padded ids `[B, S]` in the format of `generate_preprocess`."""
    missing = {"token_ids", "padding_mask"} - set(inputs)
    if missing:
        raise ValueError(
            'A dict of inputs must have the keys "token_ids" and "padding_mask". '
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
            '"padding_mask" must be True from the start of each row to the end of its prompt, and '
            "False after it: put padding after the prompt."
        )
    rows = [row[:length] for row, length in zip(token_ids, lengths, strict=True)]
    return Prompts(rows, False, width=mask.shape[1])


def max_new_tokens_in_padding(
    prompts: Prompts, max_length: int | None, max_new_tokens: list[int] | None
) -> list[int]:
    """Returns the maximum number of new tokens in each row of padded prompts.

    Args:
        max_length: Maximum length, prompt included. `None` uses the padded width.
        max_new_tokens: Maximum number of new tokens of each row. `None` uses all the padding.
    """
    end = min(prompts.width, max_length or prompts.width)
    lengths = [len(row) for row in prompts.ids]
    full = [i for i, length in enumerate(lengths) if length >= end]
    if full:
        raise ValueError(
            f"Rows {full} have no room to generate. Pad them to the maximum length, prompt "
            f"included, and increase `max_length` if it is set. Received: {end} tokens"
        )
    limits = max_new_tokens or [end] * len(lengths)
    return [min(end - length, limit) for length, limit in zip(lengths, limits, strict=True)]

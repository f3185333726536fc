"""Text to what models read: ids with start and end tokens, padded, with masks and labels.

Control tokens written in a text are tokens, so a `<bos>` at its beginning, as in rendered chat
templates, is the start token: none is added before it. Knows no model and no sampler.
"""

from typing import Any

import keras
import numpy as np

from keras_gemma import tf_data
from keras_gemma.presettable import Presettable
from keras_gemma.text.inputs import pad_rows, read_texts, to_numpy
from keras_gemma.text.tokenizer import GemmaTokenizer


@keras.saving.register_keras_serializable(package="keras_gemma")
class GemmaPreprocessor(Presettable, keras.layers.Layer):
    """Texts to the inputs of `GemmaBackbone`.

    Args:
        tokenizer: a `GemmaTokenizer`. Its own `sequence_length`, `add_bos` and `add_eos` are
            not used here.
        sequence_length: tokens a row, S. Longer texts are cut, shorter ones padded on the right.
        add_start_token: whether a row begins with `<bos>`; one written there is not doubled.
        add_end_token: whether a row ends with `<eos>`, which is kept where a text is cut; one
            written there is not doubled.
        **kwargs: `name`, `dtype` and `trainable`, as of every Keras layer.

    Call arguments:
        x: a string, or a list, tuple or 1-D array of B strings; also string tensors, inside
            `tf.data.Dataset.map` too.
        y, sample_weight: passed on as they are.
        sequence_length: instead of the layer's own, for this call.

    Returns when called:
        `{"token_ids": int32 [B, S], "padding_mask": bool [B, S]}`, without B for one string; in
        a tuple with `y` and `sample_weight` where those were given.

    Example:

    ```python
    from keras_gemma import GemmaPreprocessor, GemmaTokenizer

    tokenizer = GemmaTokenizer.from_preset("gemma_tiny_en")
    preprocessor = GemmaPreprocessor(tokenizer, sequence_length=8)
    preprocessor("It ran.")["token_ids"]            # numpy int32 [8]
    ```
    """

    tokenizer_cls = GemmaTokenizer

    def __init__(
        self,
        tokenizer: GemmaTokenizer,
        sequence_length: int = 1024,
        add_start_token: bool = True,
        add_end_token: bool = True,
        **kwargs: Any,
    ) -> None:
        kwargs.pop("config_file", None)  # KerasHub's presets name their own file here
        super().__init__(**kwargs)
        if not isinstance(tokenizer, GemmaTokenizer):
            raise TypeError(
                "`tokenizer` must be a `keras_gemma.models.GemmaTokenizer`. "
                f"Received: tokenizer={tokenizer!r}"
            )
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length
        self.add_start_token = add_start_token
        self.add_end_token = add_end_token
        self.built = True

    @property
    def sequence_length(self) -> int:
        """Tokens a row, S."""
        return self._sequence_length

    @sequence_length.setter
    def sequence_length(self, value: int) -> None:
        self._sequence_length = _check_length(value)

    def __call__(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        sequence_length: int | None = None,
    ) -> Any:
        """`call`. Strings are no tensors, so nothing of Keras's own call applies."""
        return self.call(x, y, sample_weight, sequence_length)

    def call(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        sequence_length: int | None = None,
    ) -> Any:
        """The model's inputs; see the class."""
        length = self._length(sequence_length)
        return keras.utils.pack_x_y_sample_weight(self._pack(x, length), y, sample_weight)

    def _length(self, sequence_length: int | None) -> int:
        if sequence_length is None:
            return self.sequence_length
        return _check_length(sequence_length)

    def _pack(self, x: Any, length: int) -> dict[str, Any]:
        """`x` cut and padded to `length` ids, start and end tokens included."""
        if tf_data.is_symbolic(x):
            return _map(lambda texts: self._pack(texts, length), x, length)
        texts, batched = read_texts(x)
        end = [self.tokenizer.end_token_id] if self.add_end_token else []
        if length < self.add_start_token + len(end):
            raise ValueError(
                "`sequence_length` must leave room for the start and the end token. "
                f"Received: sequence_length={length}"
            )
        rows = [ids[: length - len(end)] for ids in self._encode(texts)]
        rows = [ids if ids[-1:] == end else ids + end for ids in rows]
        return self._batch(rows, length, batched)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, with one start token where it is due, and no end token."""
        rows = self.tokenizer.encode(texts)
        start = [self.tokenizer.start_token_id] if self.add_start_token else []
        return [ids if ids[:1] == start else start + ids for ids in rows]

    def _batch(self, rows: list[list[int]], length: int, batched: bool) -> dict[str, Any]:
        ids, mask = pad_rows(rows, length, self.tokenizer.pad_token_id)
        return {
            "token_ids": ids if batched else ids[0],
            "padding_mask": mask if batched else mask[0],
        }

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, the tokenizer serialised among them."""
        return {
            **super().get_config(),
            "tokenizer": keras.saving.serialize_keras_object(self.tokenizer),
            "sequence_length": self.sequence_length,
            "add_start_token": self.add_start_token,
            "add_end_token": self.add_end_token,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "GemmaPreprocessor":
        """The preprocessor of a `get_config`."""
        tokenizer = config["tokenizer"]
        if isinstance(tokenizer, dict):
            tokenizer = keras.saving.deserialize_keras_object(tokenizer)
        return super().from_config({**config, "tokenizer": tokenizer})


@keras.saving.register_keras_serializable(package="keras_gemma")
class GemmaCausalLMPreprocessor(GemmaPreprocessor):
    """Texts to the inputs, labels and weights that `GemmaCausalLM` trains on, and to prompts.

    Arguments are those of `GemmaPreprocessor`.

    Called, it gives `(x, y, sample_weight)`: `x` as `GemmaPreprocessor` does, `y` int32 [B, S]
    the token after each of `x`, and `sample_weight` bool [B, S], False where `y` is padding.
    Texts of more than S + 1 tokens are cut.

    Example:

    ```python
    from keras_gemma import GemmaCausalLMPreprocessor, GemmaTokenizer

    tokenizer = GemmaTokenizer.from_preset("gemma_tiny_en")
    preprocessor = GemmaCausalLMPreprocessor(tokenizer, sequence_length=256)
    x, y, sample_weight = preprocessor(["It ran.", "It slept."])
    prompt = preprocessor.generate_preprocess("Once upon a")
    preprocessor.generate_postprocess(prompt)       # "Once upon a"
    ```
    """

    def call(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        sequence_length: int | None = None,
    ) -> Any:
        """Inputs, labels and weights; see the class. `y` and `sample_weight` must be None."""
        if y is not None or sample_weight is not None:
            raise ValueError(
                "Labels of a causal language model are made from the text itself: leave `y` and "
                "`sample_weight` out, for example by `dataset.map(lambda x, y: x)`. "
                f"Received: y={y}, sample_weight={sample_weight}"
            )
        # One token more than the inputs: the last is a label only, the first an input only.
        packed = self._pack(x, self._length(sequence_length) + 1)
        ids, mask = packed["token_ids"], packed["padding_mask"]
        inputs = {"token_ids": ids[..., :-1], "padding_mask": mask[..., :-1]}
        return inputs, ids[..., 1:], mask[..., 1:]

    def tokenize_prompts(self, prompts: list[str]) -> list[np.ndarray]:
        """The ids of each prompt, neither cut nor padded: int32 [T], one array a prompt.

        Raises:
            ValueError: an empty list.
            TypeError: something else than a list of strings.
        """
        texts, batched = read_texts(prompts)
        if not batched:
            raise TypeError(f"`prompts` must be a list of strings. Received: {prompts!r}")
        _check_prompts(texts)
        return [np.array(ids, "int32") for ids in self._encode(texts)]

    def generate_preprocess(self, x: Any, sequence_length: int | None = None) -> dict[str, Any]:
        """Prompts as padded ids: with `<bos>`, and without `<eos>`, for the text goes on.

        Args:
            x: a string, or a list, tuple or 1-D array of B strings.
            sequence_length: tokens a row, S; by default the layer's own.

        Returns:
            `{"token_ids": int32 [B, S], "padding_mask": bool [B, S]}`, without B for one string.

        Raises:
            ValueError: a prompt of more than S tokens, or no prompts.
        """
        length = self._length(sequence_length)
        if tf_data.is_symbolic(x):
            return _map(lambda texts: self.generate_preprocess(texts, length), x, length)
        texts, batched = read_texts(x)
        _check_prompts(texts)
        rows = self._encode(texts)
        for i, ids in enumerate(rows):
            if len(ids) > length:
                raise ValueError(
                    f"A prompt must fit into `sequence_length`, but prompt {i} has {len(ids)} "
                    f"tokens and sequence_length={length}. Pass a larger `sequence_length` (in "
                    "`generate`, a larger `max_length`), or shorten the prompt. "
                    f"Received: {texts[i][:80]!r}"
                )
        return self._batch(rows, length, batched)

    def generate_postprocess(self, x: dict[str, Any]) -> str | list[str]:
        """The text of generated ids, without padding, `<bos>` and `<eos>`.

        Args:
            x: `{"token_ids": [B, S], "padding_mask": [B, S]}`, arrays or tensors, or both [S].

        Returns:
            a list of B strings, or one string for ids [S].

        Raises:
            ValueError: shapes that differ, or an id outside the vocabulary.
        """
        ids, mask = to_numpy(x["token_ids"]), to_numpy(x["padding_mask"]).astype("bool")
        if ids.shape != mask.shape:
            raise ValueError(
                "`token_ids` and `padding_mask` must have the same shape. "
                f"Received: token_ids of shape {ids.shape}, padding_mask of shape {mask.shape}"
            )
        mask = mask & ~np.isin(ids, self.tokenizer.special_token_ids)
        if ids.ndim == 1:
            return self.tokenizer.detokenize(ids[mask])
        return [self.tokenizer.detokenize(row[keep]) for row, keep in zip(ids, mask, strict=True)]


def _map(function: Any, x: Any, length: int) -> dict[str, Any]:
    """`function`, from texts to packed ids, as a step of a `tf.data` pipeline."""
    signature = {
        "token_ids": keras.KerasTensor((length,), "int32"),
        "padding_mask": keras.KerasTensor((length,), "bool"),
    }
    return tf_data.map_numpy(function, x, signature)


def _check_length(value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            f"`sequence_length` must be a positive integer. Received: sequence_length={value!r}"
        )
    return value


def _check_prompts(texts: list[str]) -> None:
    if not texts:
        raise ValueError("Give at least one prompt. Received: an empty list")

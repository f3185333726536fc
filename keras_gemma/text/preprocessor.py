"""Preprocessors: text to padded ids with start and end tokens, masks and labels.

Names of control tokens in a text become tokens. Therefore no `<bos>` is added to a text that begins
with it, such as a rendered chat template. Knows nothing about models and samplers.
"""

from typing import Any

import keras
import numpy as np

from keras_gemma import tf_data
from keras_gemma.checks import check_integer
from keras_gemma.presettable import Presettable
from keras_gemma.text.inputs import pad_rows, read_texts, to_numpy
from keras_gemma.text.packer import StartEndPacker
from keras_gemma.text.tokenizer import GemmaTokenizer


@keras.saving.register_keras_serializable(package="keras_gemma")
class GemmaPreprocessor(Presettable, keras.layers.Layer):
    """Converts texts to the inputs of `GemmaBackbone`.

    Args:
        tokenizer: A `GemmaTokenizer`. Its `sequence_length`, `add_bos` and `add_eos` are not used.
        sequence_length: Number of tokens per row, S. Longer texts are truncated, shorter ones
            padded on the right. Defaults to 1024.
        add_start_token: If True, each row begins with `<bos>`. A `<bos>` in the text is not
            doubled. Defaults to True.
        add_end_token: If True, each row ends with `<eos>`, also if the text is truncated. An
            `<eos>` in the text is not doubled. Defaults to True.
        **kwargs: Keras layer arguments `name`, `dtype` and `trainable`.

    Call arguments:
        x: A string, or a list, tuple, 1-D array or tensor of B strings. Symbolic tensors of
            `tf.data.Dataset.map` are accepted.
        y: Labels. Returned unchanged.
        sample_weight: Sample weights. Returned unchanged.
        sequence_length: Number of tokens per row in this call. `None` uses the layer's value.

    Returns when called:
        `{"token_ids": int32 [B, S], "padding_mask": bool [B, S]}`, without B for one string. If `y`
        is passed, a tuple with `y` and `sample_weight`.

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
        """Number of tokens per row, S."""
        return self._sequence_length

    @sequence_length.setter
    def sequence_length(self, value: int) -> None:
        self._sequence_length = _check_length(value)

    @property
    def packer(self) -> StartEndPacker:
        """KerasHub's layer that adds start and end tokens to ids, for custom preprocessing."""
        tokenizer = self.tokenizer
        start, end = [tokenizer.start_token_id], [tokenizer.end_token_id]
        return StartEndPacker(self.sequence_length, start, end, tokenizer.pad_token_id)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Same as `call`. Skips the `__call__` of Keras, which only accepts tensors."""
        return self.call(*args, **kwargs)

    def call(
        self, x: Any, y: Any = None, sample_weight: Any = None, sequence_length: int | None = None
    ) -> Any:
        """Returns the model's inputs, as described in the class."""
        length = self._length(sequence_length)
        return keras.utils.pack_x_y_sample_weight(self._pack(x, length), y, sample_weight)

    def _length(self, sequence_length: int | None) -> int:
        return self.sequence_length if sequence_length is None else _check_length(sequence_length)

    def _pack(self, x: Any, length: int) -> dict[str, Any]:
        """Truncates and pads texts to `length` ids, including start and end tokens."""
        if tf_data.is_symbolic(x):
            return _map(lambda texts: self._pack(texts, length), x, length)
        texts, batched = read_texts(x)
        end = [self.tokenizer.end_token_id] if self.add_end_token else []
        if length < self.add_start_token + len(end):
            raise ValueError(
                "`sequence_length` must leave room for the start and end tokens. "
                f"Received: sequence_length={length}"
            )
        rows = [ids[: length - len(end)] for ids in self._encode(texts)]
        rows = [ids if ids[-1:] == end else ids + end for ids in rows]
        return self._batch(rows, length, batched)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Returns the ids of each text, with a start token if `add_start_token`."""
        rows = self.tokenizer.encode(texts)
        start = [self.tokenizer.start_token_id] if self.add_start_token else []
        return [ids if ids[:1] == start else start + ids for ids in rows]

    def _batch(self, rows: list[list[int]], length: int, batched: bool) -> dict[str, Any]:
        ids, mask = pad_rows(rows, length, self.tokenizer.pad_token_id)
        if not batched:
            ids, mask = ids[0], mask[0]
        return {"token_ids": ids, "padding_mask": mask}

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments. The tokenizer is serialized."""
        return {
            **super().get_config(),
            "tokenizer": keras.saving.serialize_keras_object(self.tokenizer),
            "sequence_length": self.sequence_length,
            "add_start_token": self.add_start_token,
            "add_end_token": self.add_end_token,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "GemmaPreprocessor":
        """Returns the preprocessor of a config. Inverse of `get_config`."""
        tokenizer = config["tokenizer"]
        if isinstance(tokenizer, dict):
            tokenizer = keras.saving.deserialize_keras_object(tokenizer)
        return super().from_config({**config, "tokenizer": tokenizer})


@keras.saving.register_keras_serializable(package="keras_gemma")
class GemmaCausalLMPreprocessor(GemmaPreprocessor):
    """Converts texts to training data and prompts of `GemmaCausalLM`.

    The arguments are the same as in `GemmaPreprocessor`.

    Call arguments:
        x: Same as in `GemmaPreprocessor`, or `{"prompts": ..., "responses": ...}` of texts. Each
            row is then a prompt, its response and `<eos>`, and only the response is learned. A pair
            that is too long loses the ends of both.

    Returns when called:
        `(x, y, sample_weight)`: `x` as in `GemmaPreprocessor`, the next tokens `y`, int32 `[B, S]`,
        and `sample_weight`, bool `[B, S]`, which is False for padding and prompts in `y`. Texts are
        truncated to S + 1 tokens.

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
        self, x: Any, y: Any = None, sample_weight: Any = None, sequence_length: int | None = None
    ) -> Any:
        """Returns inputs, labels and weights. `y` and `sample_weight` must be `None`."""
        if y is not None or sample_weight is not None:
            raise ValueError(
                "Labels of a causal language model are the next tokens of the text: leave `y` and "
                "`sample_weight` out, for example by `dataset.map(lambda x, y: x)`. "
                f"Received: y={y}, sample_weight={sample_weight}"
            )
        # One token more than the inputs: the first is only an input, and the last only a label.
        length = self._length(sequence_length) + 1
        packed = self._pack_pairs(x, length) if is_pairs(x) else self._pack(x, length)
        ids, mask = packed["token_ids"], packed["padding_mask"]
        inputs = {"token_ids": ids[..., :-1], "padding_mask": mask[..., :-1]}
        return inputs, ids[..., 1:], packed.get("response_mask", mask)[..., 1:]

    def _pack_pairs(self, x: dict[str, Any], length: int) -> dict[str, Any]:
        """Same as `_pack`, for prompts and responses. `response_mask` is True at the response."""
        unknown = sorted(x.keys() - {"prompts", "responses"})
        if unknown:
            raise ValueError(
                "Training data must have the keys 'prompts' and 'responses', because the models "
                f"read text only. Received: {', '.join(map(repr, unknown))}"
            )
        if tf_data.is_symbolic(x["prompts"]):
            return _map(
                lambda pairs: self._pack_pairs(pairs, length), x, length, ("response_mask",)
            )
        prompts, batched = read_texts(x["prompts"])
        responses, _ = read_texts(x["responses"])
        if len(prompts) != len(responses):
            raise ValueError(
                "`prompts` and `responses` must have the same length. "
                f"Received: {len(prompts)} prompts and {len(responses)} responses"
            )
        end = [self.tokenizer.end_token_id] if self.add_end_token else []
        space = length - len(end)
        pairs = list(zip(self._encode(prompts), self.tokenizer.encode(responses), strict=True))
        # A pair that is too long keeps at least half of the space for the response.
        kept = [min(len(b), max(space // 2, space - len(a))) for a, b in pairs]
        pairs = [(a[: space - n], b[:n] + end) for (a, b), n in zip(pairs, kept, strict=True)]
        packed = self._batch([a + b for a, b in pairs], length, batched)
        is_response, _ = pad_rows([[0] * len(a) + [1] * len(b) for a, b in pairs], length, 0)
        is_response = is_response.astype("bool")
        return {**packed, "response_mask": is_response if batched else is_response[0]}

    def tokenize_prompts(self, prompts: list[str]) -> list[np.ndarray]:
        """Returns the ids of each prompt, int32 `[T]`, neither truncated nor padded.

        Raises:
            ValueError: If the list is empty.
            TypeError: If `prompts` is not a list of strings.
        """
        texts, batched = read_texts(prompts)
        if not batched:
            raise TypeError(f"`prompts` must be a list of strings. Received: {prompts!r}")
        _check_prompts(texts)
        return [np.array(ids, "int32") for ids in self._encode(texts)]

    def generate_preprocess(self, x: Any, sequence_length: int | None = None) -> dict[str, Any]:
        """Converts prompts to padded ids, without `<eos>`.

        Args:
            x: A string, or a list, tuple or 1-D array of B strings.
            sequence_length: Number of tokens per row, S. `None` uses the layer's value.

        Returns:
            `{"token_ids": int32 [B, S], "padding_mask": bool [B, S]}`, without B for one string.

        Raises:
            ValueError: If a prompt has more than S tokens, or the list is empty.
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
        """Returns the text of generated ids, without padding, `<bos>` and `<eos>`.

        Args:
            x: `{"token_ids": [B, S], "padding_mask": [B, S]}`, arrays or tensors. Both may be
                `[S]`.

        Returns:
            A list of B strings, or one string for ids `[S]`.

        Raises:
            ValueError: If the shapes differ, or an id is outside the vocabulary.
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


def require_preprocessor(
    preprocessor: Any, purpose: str = "text", alternative: str | None = "Pass token ids"
) -> None:
    """Raises a ValueError if the model has no preprocessor.

    Args:
        purpose: Feature that needs the preprocessor.
        alternative: Advice that avoids the preprocessor, if there is one.
    """
    if preprocessor is None:
        remedy = "Create" if alternative is None else f"{alternative}, or create"
        raise ValueError(
            f"This model has no preprocessor, which {purpose} requires. {remedy} the model with "
            "`GemmaCausalLM(backbone, preprocessor)`."
        )


def is_pairs(x: Any) -> bool:
    """Returns True if `x` is a dict of prompts and responses."""
    return isinstance(x, dict) and "prompts" in x and "responses" in x


def _map(function: Any, x: Any, length: int, masks: tuple[str, ...] = ()) -> dict[str, Any]:
    signature = {
        "token_ids": keras.KerasTensor((length,), "int32"),
        **{name: keras.KerasTensor((length,), "bool") for name in ("padding_mask", *masks)},
    }
    return tf_data.map_numpy(function, x, signature)


def _check_length(value: int) -> int:
    check_integer("sequence_length", value)
    return int(value)


def _check_prompts(texts: list[str]) -> None:
    if not texts:
        raise ValueError("Pass at least one prompt. Received: an empty list")

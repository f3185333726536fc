"""Strings as inputs of `fit`, `evaluate` and `predict`, in all containers that Keras accepts."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import keras
import numpy as np

from keras_gemma import tf_data
from keras_gemma.text.preprocessor import GemmaCausalLMPreprocessor, is_pairs


def is_text(x: Any) -> bool:
    """Returns True if `x` is one string: a Python or NumPy string, or a scalar string tensor."""
    if isinstance(x, str | bytes):
        return True
    return getattr(x, "ndim", None) == 0 and holds_strings(x)


def holds_strings(x: Any) -> bool:
    """Returns True if `x` is a list, tuple, array or tensor of strings."""
    dtype = getattr(x, "dtype", None)
    if dtype is None:
        return isinstance(x, list | tuple) and bool(x) and is_text(x[0])
    kind = getattr(dtype, "kind", "")
    if kind == "O":
        return bool(x.size) and isinstance(x.flat[0], str | bytes)
    return kind in ("U", "S", "T") or "string" in str(dtype)


def encode_inputs(
    preprocessor: GemmaCausalLMPreprocessor | None, x: Any, y: Any = None, sample_weight: Any = None
) -> tuple[Any, Any, Any]:
    """Returns `(x, y, sample_weight)` with strings replaced by ids, labels and weights.

    Strings are in a list, tuple or array, or in a dict of prompts and responses; or in batches of
    these, from a `tf.data.Dataset`,
    `keras.utils.PyDataset`, PyTorch loader or generator. Other inputs, and data sets with an
    attribute `holds_ids`, are returned unchanged.
    """
    if preprocessor is not None and is_pairs(x):
        return preprocessor(x, y, sample_weight)
    if preprocessor is None or isinstance(x, dict) or x is None or getattr(x, "holds_ids", False):
        return x, y, sample_weight
    if is_text(x):
        raise ValueError(
            f"Texts must be in a batch. Pass a list of strings. Received: one string, {x!r:.60}"
        )
    if holds_strings(x):
        return preprocessor(x, y, sample_weight)
    if tf_data.is_dataset(x):
        return tf_data.map_strings(preprocessor, x), y, sample_weight
    if isinstance(x, list) and x and isinstance(x[0], Mapping | list | tuple | np.integer | int):
        raise TypeError(
            "A list must have strings. Conversations are trained with `training.chat_dataset`, as "
            '`lm.fit(training.chat_dataset([{"messages": [...]}], lm.preprocessor.tokenizer))`. '
            'Token ids are passed as arrays: {"token_ids", "padding_mask"}, both [B, T], with '
            f"`y` as labels [B, T]. Received: a list of {type(x[0]).__name__}"
        )
    is_array = hasattr(x, "dtype") or isinstance(x, list | tuple)
    is_loader = isinstance(x, Iterable) and not is_array
    if isinstance(x, keras.utils.PyDataset) or (is_loader and hasattr(x, "__len__")):
        return _EncodedDataset(preprocessor, x), y, sample_weight
    if is_loader:
        return (_encode_batch(preprocessor, batch) for batch in x), y, sample_weight
    return x, y, sample_weight


def has_fixed_order(x: Any) -> bool:
    """Returns True if encoded inputs `x` are read in order, because Keras cannot shuffle them."""
    return getattr(x, "keeps_order", False) or tf_data.is_dataset(x) or isinstance(x, Iterator)


def _encode_batch(preprocessor: GemmaCausalLMPreprocessor, batch: Any) -> Any:
    texts = batch[0] if isinstance(batch, tuple) and len(batch) == 1 else batch
    return preprocessor(texts) if holds_strings(texts) or is_pairs(texts) else batch


class _EncodedDataset(keras.utils.PyDataset):
    """Data set that encodes batches of strings as ids, labels and weights.

    The batches come from a `PyDataset`, or from a loader, which must be read in order. Index 0
    restarts a loader, which shuffles when it is read again.
    """

    def __init__(self, preprocessor: GemmaCausalLMPreprocessor, batches: Any) -> None:
        self.keeps_order = not isinstance(batches, keras.utils.PyDataset)
        options = ("workers", "use_multiprocessing", "max_queue_size")
        super().__init__(**{} if self.keeps_order else {o: getattr(batches, o) for o in options})
        self.preprocessor = preprocessor
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Any:
        if not self.keeps_order:
            return _encode_batch(self.preprocessor, self.batches[index])
        if index == 0:
            self.iterator = iter(self.batches)
        return _encode_batch(self.preprocessor, next(self.iterator))

    def on_epoch_end(self) -> None:
        if not self.keeps_order:
            self.batches.on_epoch_end()

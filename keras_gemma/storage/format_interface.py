"""Interfaces of a format of models: one that can be read, and one that can be written too."""

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from keras_gemma.config import GemmaConfig
from keras_gemma.storage.tensor_streaming import Specs, StoredTensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reader:
    """Names and functions for reading a format. Most functions take the folder, or the file."""

    title: str
    """Name of such a folder or file in messages, such as `"Keras preset"`."""
    read_backbone: Callable[[Path], dict[str, Any]]
    """Returns `GemmaBackbone`'s arguments, checked as untrusted input.

    `dtype` and `quantization` are among them only if the format stores them.
    """
    read_tokenizer: Callable[[Path], dict[str, Any]]
    """Returns `GemmaTokenizer`'s arguments, with the vocabulary in bytes as `proto`."""
    tensor_specs: Callable[..., Specs]
    """Returns the specs for a `GemmaConfig`, a folder or `None`, and a quantization or `None`."""
    open_weights: Callable[[Path], AbstractContextManager[dict[str, StoredTensor]]]
    """Yields the stored tensors by name, readable within the block."""
    read_preprocessor: Callable[[Path], dict[str, Any] | None] = lambda folder: {}
    """Returns the preprocessor's arguments without the tokenizer.

    Returns `None` if the model was saved without a preprocessor.
    """
    read_errors: Callable[[Path], dict[str, float]] = lambda folder: {}
    """Returns the known relative errors of quantized weights, by logical name."""
    read_stored_types: Callable[[Path, GemmaConfig], dict[str, str]] | None = None
    """Returns the ggml types of weights that can be kept as stored, by logical name."""
    find_ignored_part: Callable[[Path], str | None] = lambda folder: None
    """Returns a warning about a part of the text processing that is not used, if there is one."""
    requires_config: bool = True
    """True if a folder without config.json holds no model."""
    required_arguments: tuple[str, ...] = ()
    """Arguments of `GemmaBackbone` that the caller must pass if `read_backbone` leaves them out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format(Reader):
    """A format of model folders."""

    signs: str
    """Keys and files that `matches` looks for, for a message."""
    library: str | None
    """`library_name` in the model card of an uploaded folder. `None` disables uploads."""
    files: tuple[str, ...]
    """Patterns of the format's file names, relative to the folder. A save replaces these files;
    other files belong to the user.
    """
    markers: dict[str, bytes] = dataclasses.field(default_factory=dict)
    """Content that distinguishes a file from another format's file of the same name."""
    default_shard_size: str
    """Default maximum size of a weights file, such as `"10GB"`."""

    matches: Callable[[Path], bool]
    """Returns True if the folder has this format. A folder with only a tokenizer has one too."""
    write: Callable[[Any, Path, int], None]
    """Writes a `GemmaCausalLM` to an empty folder, in files of at most this number of bytes."""

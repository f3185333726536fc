"""Interface of a format of model folders, and the list of all formats.

To add a format, write a package with the members of `Format`, next to `keras_preset/`, and add the
package to `FORMATS`. `from_preset`, `upload_preset`, saves and `keras-gemma convert` use this list.
"""

import contextlib
import fnmatch
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from keras_gemma.config import GemmaConfig
from keras_gemma.quantization import QuantizationConfig
from keras_gemma.storage import hugging_face, keras_preset
from keras_gemma.storage.files import local_path, read_json, replacing
from keras_gemma.storage.gguf import reader as gguf_reader
from keras_gemma.storage.sharding import parse_size
from keras_gemma.storage.tensor_streaming import (
    QuantizedTensorSpec,
    StoredTensor,
    TensorSpec,
    check,
)

CONFIG = "config.json"
"""File of every format that describes the model. Absent if a folder holds only a tokenizer."""
MAX_LISTED_NAMES = 8
"""Maximum number of file names listed in a message."""


class Reader(Protocol):
    """Interface of a format that can be read."""

    TITLE: str
    """Name of such a folder in messages, such as `"Keras preset"`."""
    IGNORED_TENSORS: tuple[str, ...]
    """Tensors in weights files that a model does not need."""

    def matches(self, folder: Path) -> bool:
        """Returns True if `folder` has this format. A folder with only a tokenizer has one too."""

    def read_backbone(self, folder: Path) -> dict[str, Any]:
        """Returns `GemmaBackbone`'s arguments, checked as untrusted input.

        `dtype` and `quantization` are among them only if the format stores them.
        """

    def read_tokenizer(self, folder: Path) -> dict[str, Any]:
        """Returns `GemmaTokenizer`'s arguments, with the vocabulary in bytes as `proto`."""

    def read_preprocessor(self, folder: Path) -> dict[str, Any] | None:
        """Returns the preprocessor's arguments without the tokenizer.

        Returns `None` if the model was saved without a preprocessor.
        """

    def read_errors(self, folder: Path) -> dict[str, float]:
        """Returns the known relative errors of quantized weights, by logical name."""

    def tensor_specs(
        self,
        config: GemmaConfig,
        folder: Path | None = None,
        quantization: QuantizationConfig | None = None,
    ) -> dict[str, TensorSpec | QuantizedTensorSpec]:
        """Returns the stored tensor of each weight, by logical name."""

    def open_weights(self, folder: Path) -> AbstractContextManager[dict[str, StoredTensor]]:
        """Yields the stored tensors by name, readable within the block."""


class Format(Reader, Protocol):
    """Interface of a format of folders. A package implements it with its members."""

    SIGNS: str
    """Keys and files that `matches` looks for, for a message."""
    LIBRARY: str
    """`library_name` in the model card of an uploaded folder."""
    FILES: tuple[str, ...]
    """Patterns of the format's file names, relative to the folder. A save replaces these files;
    other files belong to the user.
    """
    MARKERS: dict[str, bytes]
    """Content that distinguishes a file from another format's file of the same name."""
    DEFAULT_SHARD_SIZE: str
    """Default maximum size of a weights file, such as `"10GB"`."""

    def write(self, task: Any, folder: Path, max_shard_bytes: int) -> None:
        """Writes a `GemmaCausalLM` to the empty `folder`."""


FORMATS: dict[str, Format] = {"keras": keras_preset, "hugging_face": hugging_face}
"""Formats of folders by name. Detection tries them in this order. GGUF is a format of files."""


def format_of(folder: Path) -> Reader:
    """Returns the format of `folder`, which may be a GGUF file.

    Raises:
        ValueError: If no format matches.
    """
    if folder.is_file():
        return gguf_reader
    for format in FORMATS.values():
        if format.matches(folder):
            return format
    signs = "; ".join(f"{format.SIGNS} ({format.TITLE})" for format in FORMATS.values())
    path = folder / CONFIG
    keys = ""
    if path.is_file():
        keys = f" Its {CONFIG} has the keys {', '.join(sorted(read_json(path))) or 'none'}."
    raise ValueError(
        f"{folder} is not a preset: looked for {signs}. It holds {list_names(folder)}.{keys} "
        "Pass a folder that `lm.save_to_preset(...)` wrote or a Hugging Face checkpoint."
    )


@contextlib.contextmanager
def open_checked(
    format: Reader, folder: Path, config: GemmaConfig, quantization: QuantizationConfig | None
) -> Iterator[tuple[dict[str, StoredTensor], dict[str, TensorSpec | QuantizedTensorSpec]]]:
    """Yields the tensors in `folder` and the specs of the weights, after comparing both.

    Raises:
        ValueError: If tensors are missing, unexpected, or of another shape or dtype.
        FileNotFoundError: If weights are missing.
    """
    specs = format.tensor_specs(config, folder, quantization)
    with format.open_weights(folder) as stored:
        check(stored, specs, folder, ignored=format.IGNORED_TENSORS)
        yield stored, specs


def save_as(
    task: Any,
    format_name: str,
    directory: str | Path,
    max_shard_size: int | str | None = None,
    argument: str = "directory",
) -> None:
    """Writes `task` to `directory` in a format of `FORMATS`.

    Files of an earlier model, in any format, are replaced together when all new files are complete.

    Args:
        task: A `GemmaCausalLM`.
        format_name: Key of `FORMATS`.
        directory: The folder, created if it does not exist.
        max_shard_size: Maximum size of a weights file, in bytes or as `"5GB"`. `None` uses the
            default of the format.
        argument: The caller's name of `directory`, for messages.

    Raises:
        ValueError: If `directory` is a file, the current directory, a URL or not writable; if
            `max_shard_size` is too small; or if the format cannot express the model.
        TypeError: If `directory` is neither a string nor a path.
    """
    format = FORMATS[format_name]
    directory = local_path(directory, argument)
    limit = parse_size(format.DEFAULT_SHARD_SIZE if max_shard_size is None else max_shard_size)
    with replacing(directory, is_model_file, argument) as folder:
        format.write(task, folder, limit)


def is_model_file(name: str) -> bool:
    """Returns True if a file of this name, relative to its folder, is part of a model."""
    return any(_is_file_of(format, name) for format in FORMATS.values())


def check_only_format(format: Format, folder: Path) -> None:
    """Checks that saving a part of a model in `format` would not mix it with another format.

    Raises:
        ValueError: If `folder` holds files of another format. The message names them.
    """
    paths = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    for other in FORMATS.values():
        names = [
            path.name
            for path in paths
            if other is not format
            and _is_file_of(other, path.name)
            and (path.name not in other.MARKERS or other.MARKERS[path.name] in path.read_bytes())
        ]
        if names:
            raise ValueError(
                f"`preset_dir` holds a {other.TITLE}, and a part of a {format.TITLE} would mix "
                "with it. Save to a separate folder, or replace the folder's model with a whole "
                f"model: `lm.save_to_preset(...)`. Received: preset_dir={str(folder)!r}, which "
                f"holds {', '.join(names)}"
            )


def list_names(folder: Path) -> str:
    """Returns the first names in `folder`, for a message."""
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    rest = f" and {len(names) - MAX_LISTED_NAMES} more" if len(names) > MAX_LISTED_NAMES else ""
    return (", ".join(names[:MAX_LISTED_NAMES]) or "nothing") + rest


def _is_file_of(format: Format, name: str) -> bool:
    return any(
        fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/")
        for pattern in format.FILES
    )

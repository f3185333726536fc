"""List of all formats of model folders, and what is the same for all of them.

To add a format, write a package with a `Format`, next to `keras_preset/`, and add it to `FORMATS`.
`from_preset`, `upload_preset` and saves use this list. Other modules have lists of their own:
`hub_caches.py` is on a lower floor, `hub/downloads.py` fetches files before their format is known,
`hub/upload.py` knows which files are weights, and `cli/convert.py` is imported before Keras.
"""

import contextlib
import fnmatch
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from keras_gemma.config import GemmaConfig
from keras_gemma.quantization import QuantizationConfig
from keras_gemma.storage import hugging_face, keras_preset, orbax
from keras_gemma.storage.files import Kind, check_target, local_path, read_json, replacing
from keras_gemma.storage.format_interface import Format, Reader
from keras_gemma.storage.gguf import reader as gguf_reader
from keras_gemma.storage.sharding import parse_size
from keras_gemma.storage.tensor_streaming import Specs, StoredTensor, check

CONFIG = "config.json"
"""File of every format that describes the model. Absent if a folder holds only a tokenizer."""
MAX_LISTED_NAMES = 8
"""Maximum number of file names listed in a message."""


FORMATS = {
    "orbax": orbax.FORMAT,  # may have a config.json of the others next to its arrays
    "keras": keras_preset.FORMAT,
    "hugging_face": hugging_face.FORMAT,
}
"""Formats of folders by name. Detection tries them in this order. GGUF is a format of files."""


def format_of(path: Path) -> Reader:
    """Returns the format of the folder or GGUF file at `path`."""
    if path.is_file():
        return gguf_reader.READER
    for format in FORMATS.values():
        if format.matches(path):
            return format
    signs = "; ".join(f"{format.signs} ({format.title})" for format in FORMATS.values())
    keys = ""
    if (path / CONFIG).is_file():
        names = ", ".join(sorted(read_json(path / CONFIG))) or "none"
        keys = f" Its {CONFIG} has the keys {names}."
    raise ValueError(
        f"{path} is not a preset: looked for {signs}. It holds {list_names(path)}.{keys} "
        "Pass a folder that `lm.save_to_preset(...)` wrote, or a Hugging Face or Orbax checkpoint."
    )


def is_gemma(folder: Path) -> bool:
    """Returns True if `folder` holds a Gemma model or a part of one, in a format of `FORMATS`."""
    try:
        format = format_of(folder)
        if folder.is_dir() and (folder / CONFIG).is_file():
            format.read_backbone(folder)
        return folder.is_dir()
    except (ValueError, OSError):
        return False


MODELS = Kind("folders of Gemma models", is_gemma)
"""Folders that saving a model may replace."""


@contextlib.contextmanager
def open_checked(
    format: Reader, folder: Path, config: GemmaConfig, quantization: QuantizationConfig | None
) -> Iterator[tuple[dict[str, StoredTensor], Specs]]:
    """Yields the tensors in `folder` and the specs of the weights, after comparing both."""
    specs = format.tensor_specs(config, folder, quantization)
    with format.open_weights(folder) as stored:
        check(stored, specs, folder)
        yield stored, specs


def save_as(
    task: Any,
    format_name: str,
    directory: str | Path,
    max_shard_size: int | str | None = None,
    argument: str = "directory",
    overwrite: bool = False,
) -> None:
    """Writes `task`, a `GemmaCausalLM`, to `directory` in a format of `FORMATS`.

    With `overwrite`, files of an earlier model, in any format, are replaced together when all new
    files are complete. `argument` is the caller's name of `directory`, for messages.
    """
    format = FORMATS[format_name]
    directory = local_path(directory, argument)
    check_target(directory, MODELS, overwrite, argument)
    limit = parse_size(format.default_shard_size if max_shard_size is None else max_shard_size)
    stale = [pattern for format in FORMATS.values() for pattern in format.files]
    with replacing(directory, lambda name: matches_any(name, stale), argument) as folder:
        format.write(task, folder, limit)


def check_only_format(format: Format, folder: Path) -> None:
    """Checks that saving a part of a model in `format` would not mix it with another format."""
    paths = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    for other in FORMATS.values():
        names = [
            path.name
            for path in paths
            if other is not format
            and matches_any(path.name, other.files)
            and (path.name not in other.markers or other.markers[path.name] in path.read_bytes())
        ]
        if names:
            article = "an" if other.title[0] in "AEIOU" else "a"
            raise ValueError(
                f"`preset_dir` holds {article} {other.title}, and a part of a {format.title} would "
                "mix with it. Save to a separate folder, or replace the folder's model with a "
                "whole model: `lm.save_to_preset(...)`. Received: "
                f"preset_dir={str(folder)!r}, which holds {', '.join(names)}"
            )


def list_names(folder: Path) -> str:
    """Returns the first names in `folder`, for a message."""
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    rest = f" and {len(names) - MAX_LISTED_NAMES} more" if len(names) > MAX_LISTED_NAMES else ""
    return (", ".join(names[:MAX_LISTED_NAMES]) or "nothing") + rest


def matches_any(name: str, patterns: Iterable[str]) -> bool:
    """Returns True if a relative path matches a pattern in the same number of folders."""
    return any(
        fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/")
        for pattern in patterns
    )

"""Export folder: checked before the export, and moved to its path when it is complete.

Knows nothing about formats except their names.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from keras_gemma.storage.files import local_path, read_json, replacing, write_json
from keras_gemma.version import __version__

DESCRIPTION = "export.json"
"""Name of the file that marks a folder as an export."""


@contextlib.contextmanager
def new_folder(path: str | Path, format: str, overwrite: bool) -> Iterator[Path]:
    """Yields a temporary folder, which replaces `path` at the end of the block.

    If the block raises, `path` is unchanged.

    Raises:
        ValueError: If `path` exists and `overwrite` is False, or `path` is not an export.
    """
    target = local_path(path, "path")
    if target.exists() and not overwrite:
        raise ValueError(
            "`path` exists: choose another path, or pass overwrite=True. "
            f"Received: path={str(path)!r}"
        )
    if target.is_dir() and any(target.iterdir()) and not is_export(target):
        raise ValueError(
            "`overwrite=True` replaces only exports, and this folder has other files: choose "
            f"another path. Received: path={str(path)!r}"
        )
    with replacing(target, stale=lambda name: True, argument="path") as directory:
        yield directory
        write_json(directory / DESCRIPTION, {"format": format, "keras_gemma_version": __version__})


def is_export(folder: Path) -> bool:
    """Returns True if `folder` was written by `export`."""
    description = folder / DESCRIPTION
    return description.is_file() and "keras_gemma_version" in read_json(description)

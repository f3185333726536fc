"""The folder of an export: checked before the work, and in its place when it is whole.

Knows nothing of formats but their names.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from keras_gemma.storage.files import local_path, read_json, replacing, write_json
from keras_gemma.version import __version__

DESCRIPTION = "export.json"
"""What tells an export from other folders."""


@contextlib.contextmanager
def new_folder(path: str | Path, format: str, overwrite: bool) -> Iterator[Path]:
    """A folder to write into, which becomes `path` when the block ends well.

    If the block raises, what was there before is as it was.

    Raises:
        ValueError: there is something at `path`, and no leave to replace it; or it is no export.
    """
    target = local_path(path, "path")
    if target.exists() and not overwrite:
        raise ValueError(
            f"`path` exists: name another, or pass overwrite=True. Received: path={str(path)!r}"
        )
    if target.is_dir() and any(target.iterdir()) and not is_export(target):
        raise ValueError(
            "`overwrite=True` replaces an export as a whole, and this folder holds something else: "
            f"name another. Received: path={str(path)!r}"
        )
    with replacing(target, stale=lambda name: True, argument="path") as directory:
        yield directory
        write_json(directory / DESCRIPTION, {"format": format, "keras_gemma_version": __version__})


def is_export(folder: Path) -> bool:
    """Whether `folder` was made by `export`."""
    description = folder / DESCRIPTION
    return description.is_file() and "keras_gemma_version" in read_json(description)

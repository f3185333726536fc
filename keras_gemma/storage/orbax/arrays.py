"""Opens the arrays of an Orbax checkpoint with the package `tensorstore`, without JAX.

Orbax stores each array in the Zarr format, all of them in one key-value store: a database of the
kind OCDBT, or in plain folders. Training checkpoints have the model in a folder `default`.
"""

import re
from pathlib import Path
from types import ModuleType
from typing import Any

from keras_gemma.extras import install_hint
from keras_gemma.storage.files import read_json, within
from keras_gemma.storage.orbax import layout
from keras_gemma.storage.tensor_streaming import MAX_LAYERS

_DRIVERS = {".zarray": "zarr", "zarr.json": "zarr3"}
"""Driver of an array, by the file that describes it."""

_ERRORS = (ValueError, IndexError, NotImplementedError, OSError, RuntimeError)
"""Errors of `tensorstore` for damaged files."""

_STACKED = re.compile(r"stacked_layers/attention_type_(\d+)/(.*)")


def checkpoint_root(folder: Path) -> Path | None:
    """Returns the folder of the checkpoint: `folder`, or the only one inside it, or `None`."""
    if _holds_checkpoint(folder):
        return folder
    if (folder / layout.CONFIG).is_file():  # describes another format
        return None
    inside = [path for path in folder.iterdir() if path.is_dir() and _holds_checkpoint(path)]
    return inside[0] if len(inside) == 1 else None


def _holds_checkpoint(folder: Path) -> bool:
    return (folder / layout.MANIFEST).is_file() or (folder / layout.METADATA).is_file()


def open_arrays(folder: Path) -> dict[str, Any]:
    """Returns the arrays of the checkpoint in `folder` by DeepMind's name. Reads no numbers."""
    tensorstore = import_tensorstore("Reading")
    root = checkpoint_root(folder)
    for path in root.rglob("*"):
        within(folder, path)
    store: dict[str, Any] = {"driver": "file", "path": f"{root.resolve()}/"}
    if (root / layout.MANIFEST).is_file():
        store = {"driver": "ocdbt", "base": store}
    try:
        keys = tensorstore.KvStore.open(store).result().list().result()
        entries = _entries(keys)
        # Earlier releases of Orbax left out chunks of zeros.
        complete = _says_complete(root)
        futures = {
            name: tensorstore.open(
                {
                    "driver": driver,
                    "kvstore": {**store, "path": store.get("path", "") + key},
                    "fill_missing_data_reads": not complete,
                },
                open=True,
                read=True,
            )
            for name, (driver, key) in entries.items()
        }
        arrays = {name: future.result() for name, future in futures.items()}
    except _ERRORS as error:
        raise damaged(root, error) from error
    return _unstack(arrays, root)


def damaged(root: Path, error: Exception) -> ValueError:
    """Returns the error for files that `tensorstore` cannot read."""
    reason = str(error).partition(" [")[0]
    return ValueError(
        f"{root} cannot be read as an Orbax checkpoint: {reason}. Fetch or save it again."
    )


def import_tensorstore(action: str) -> ModuleType:
    try:
        import tensorstore
    except ImportError as error:
        raise ImportError(
            f"{action} Orbax checkpoints needs the package tensorstore. {install_hint('orbax')}"
        ) from error
    return tensorstore


def _entries(keys: list[bytes]) -> dict[str, tuple[str, str]]:
    """Returns driver and key of each array by DeepMind's name."""
    found = {}
    for key in keys:
        path, _, file = key.decode(errors="replace").rpartition("/")
        if file in _DRIVERS:
            found[path] = (_DRIVERS[file], f"{path}/")
    is_training = any(path.startswith("params.") for path in found)
    entries: dict[str, tuple[str, str]] = {}
    for path, entry in found.items():
        name = layout.canonical_name(path)
        if name is not None and (not is_training or path.startswith("params.")):
            if name in entries:
                raise ValueError(f"{name} is stored twice")
            entries[name] = entry
    unknown = sorted(name for name in entries if not layout.is_known(name))
    if unknown or not entries:
        problem = f"arrays such as {unknown[0]}" if unknown else "no arrays"
        raise ValueError(f"it holds {problem}, which is not a text model of Gemma 1, 2 or 3")
    return entries


def _says_complete(root: Path) -> bool:
    path = root / layout.METADATA
    return path.is_file() and read_json(path).get("store_array_data_equal_to_fill_value") is True


def _unstack(arrays: dict[str, Any], root: Path) -> dict[str, Any]:
    """Returns the arrays with one for each layer.

    Some checkpoints stack the layers with the same place in the pattern of local and global layers:
    with a pattern of P, entry `s` of `attention_type_p` belongs to layer `s * P + p`.
    """
    matches = {name: _STACKED.fullmatch(name) for name in arrays}
    pattern = max((int(match[1]) + 1 for match in matches.values() if match), default=0)
    single = {}
    for name, array in arrays.items():
        match = matches[name]
        if match is None:
            single[name] = array
            continue
        count = array.shape[0] if array.ndim else 0
        if count * pattern > MAX_LAYERS + pattern:
            raise damaged(root, ValueError(f"{name} stacks {count} layers"))
        for i in range(count):
            single[f"layer_{i * pattern + int(match[1])}/{match[2]}"] = array[i]
    return single

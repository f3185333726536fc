"""Writes safetensors files, and locates their tensors, which are read without mapping the file.

The safetensors library validates the file's header and offsets. It does not expose the offsets, so
they are read from the header here.
"""

import json
from pathlib import Path

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from keras_gemma.storage.tensor_streaming import StoredTensor, in_file

_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def save_file(
    arrays: dict[str, np.ndarray], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Writes a file that others may read as any new file, or as before if `path` exists.

    The library's own files are readable only by their owner.
    """
    path.touch()
    mode = path.stat().st_mode
    safetensors.numpy.save_file(arrays, path, metadata)
    path.chmod(mode)


def tensors(path: Path) -> dict[str, StoredTensor]:
    """Returns all tensors of the file by name. The file is not kept open."""
    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise ValueError(
            f"{path} cannot be read as safetensors: {error}. Fetch the checkpoint again."
        ) from error
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: in_file(
            path,
            8 + length + entry["data_offsets"][0],
            tuple(entry["shape"]),
            _DTYPES.get(entry["dtype"], entry["dtype"]),
        )
        for name, entry in header.items()
    }

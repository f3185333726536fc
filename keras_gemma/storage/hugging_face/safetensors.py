"""Locates the tensors in a safetensors file, which are read one by one without mapping the file.

The safetensors library validates the file's header and offsets. It does not expose the offsets, so
they are read from the header here. Also writes small files; `writer.py` streams large ones.
"""

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file as write_file

from keras_gemma.storage.tensor_streaming import StoredTensor, in_file

_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


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


def save_file(arrays: dict[str, np.ndarray], path: Path, metadata: dict[str, str]) -> None:
    """Writes arrays to a file that others may read, as far as the process's umask allows.

    The library by itself creates a file that only its owner can read.
    """
    path.touch()
    mode = path.stat().st_mode
    write_file(arrays, path, metadata)
    path.chmod(mode)

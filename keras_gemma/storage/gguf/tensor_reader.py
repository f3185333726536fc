"""Reads the tensors of a GGUF file. The package `gguf` dequantizes. Knows nothing about models."""

import contextlib
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from keras_gemma import backend
from keras_gemma.extras import install_hint
from keras_gemma.storage.gguf.header import TensorInfo, read_header, size_of
from keras_gemma.storage.gguf.layout import EMBEDDING
from keras_gemma.storage.gguf.plain_forms import plain_form
from keras_gemma.storage.tensor_streaming import StoredTensor

CHUNK_ELEMENTS = 1 << 22
"""Elements that are dequantized at a time."""

CHUNK_BYTES = 1 << 22
"""Bytes that are compared at a time."""

HEAD = "output.weight"
"""Copy of the embedding that some files have."""


@contextlib.contextmanager
def open_weights(path: Path) -> Iterator[dict[str, StoredTensor]]:
    """Yields the tensors of the file, dequantized when they are read."""
    gguf = _import_gguf()
    size = path.stat().st_size
    infos = dict(read_header(path).tensors)
    tensors = {}
    for name, info in infos.items():
        kind = kind_of(name, info, path)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if info.shape[-1] % block or info.offset + size_of(info.shape, block, block_bytes) > size:
            raise ValueError(f"{path} is cut short, or {name} is damaged. Download it again.")
        tensors[name] = _tensor(gguf, path, info, kind)
    if tensors.pop(HEAD, None) and not _is_copy(gguf, path, infos[HEAD], infos.get(EMBEDDING)):
        raise ValueError(
            f"{path} has a head that differs from the embedding, {HEAD}, but Gemma has one matrix "
            "for both. Choose another file."
        )
    yield tensors


def _is_copy(gguf: ModuleType, path: Path, info: TensorInfo, other: TensorInfo | None) -> bool:
    """Returns True if two tensors have the same shape, type and bytes."""
    if other is None or (info.shape, info.type) != (other.shape, other.type):
        return False
    left = size_of(info.shape, *gguf.GGML_QUANT_SIZES[info.type])
    with open(path, "rb") as file, open(path, "rb") as other_file:
        file.seek(info.offset)
        other_file.seek(other.offset)
        while left > 0:
            count = min(left, CHUNK_BYTES)
            if file.read(count) != other_file.read(count):
                return False
            left -= count
    return True


def kind_of(name: str, info: TensorInfo, path: Path) -> Any:
    """Returns the type of a tensor, which the package gguf must know and dequantize."""
    gguf = _import_gguf()
    try:
        kind = gguf.GGMLQuantizationType(info.type)
        if is_dequantized(kind):
            return kind
        problem = f"the type {kind.name}, which the package gguf does not dequantize"
    except ValueError:
        problem = f"the unknown type {info.type}"
    raise ValueError(
        f"{path} holds {name} in {problem}. Update the package gguf, or choose a file with another "
        "quantization, such as Q8_0."
    )


@functools.cache
def is_dequantized(kind: Any) -> bool:
    """Returns True if the package gguf dequantizes the type `kind`."""
    gguf = _import_gguf()
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.quants.dequantize(np.zeros((1, block_bytes), "uint8"), kind)
    except NotImplementedError:
        return False
    return True


def _tensor(gguf: ModuleType, path: Path, info: TensorInfo, kind: Any) -> StoredTensor:
    """Returns a tensor that is dequantized in chunks, into the dtype of its weight.

    Norms are read in float32, because 1 is subtracted from them before they are rounded.
    """
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    length = info.shape[-1]
    rows = math.prod(info.shape[:-1])
    row_bytes = length // block * block_bytes

    def read_bytes(part: slice) -> np.ndarray:
        start, stop, _ = part.indices(rows)
        with open(path, "rb") as file:
            file.seek(info.offset + start * row_bytes)
            data = file.read((stop - start) * row_bytes)
        if len(data) < (stop - start) * row_bytes:
            raise ValueError(f"{path} is cut short. Download it again.")
        return np.frombuffer(data, "uint8").reshape(-1, row_bytes)

    def float_rows(part: slice) -> np.ndarray:
        return gguf.quants.dequantize(read_bytes(part), kind)

    def plain_rows(part: slice) -> backend.Quantized:
        return plain_form(read_bytes(part), kind.name, block_bytes)

    def read(dtype: str = "float32") -> np.ndarray:
        # Not float16, so that `stream` finds numbers beyond its range.
        array = backend.empty((rows, length), "bfloat16" if dtype == "bfloat16" else "float32")
        step = max(1, CHUNK_ELEMENTS // length)
        for start in range(0, rows, step):
            part = slice(start, start + step)
            array[part] = float_rows(part)
        return array.reshape(info.shape)

    is_matrix = len(info.shape) > 1
    return StoredTensor(
        info.shape,
        "float32",
        read,
        reads_as=is_matrix,
        plain_rows=plain_rows,
        float_rows=float_rows if is_matrix else None,
    )


def _import_gguf() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            f"Reading GGUF files needs the package gguf. {install_hint('gguf')}"
        ) from error
    return gguf

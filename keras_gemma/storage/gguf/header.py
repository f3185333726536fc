"""Reads the header of a GGUF file: metadata, and the position of each tensor.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md describes the format. Every count and
length is compared with the size of the file before it is used, because the file is untrusted.
Knows nothing about models.
"""

import dataclasses
import functools
import math
import mmap
import reprlib
import struct
from pathlib import Path
from typing import Any

import numpy as np

from keras_gemma.checks import is_integer

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
"""Default alignment of tensors, in bytes."""
MAX_DIMENSIONS = 4
MIN_TENSOR_INFO, MIN_PAIR = 32, 13
"""Minimum sizes of the description of a tensor and of a key with its value, in bytes."""

NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?"} | {
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
"""NumPy dtype of each number type of metadata."""
STRING, ARRAY = 8, 9


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Position of a tensor in a file."""

    shape: tuple[int, ...]
    """Shape in NumPy's order, which is the reverse of the file's."""
    type: int
    """Number of the GGML type."""
    offset: int
    """Offset in the file, in bytes."""


@dataclasses.dataclass(frozen=True)
class Header:
    """Metadata and tensors of a file."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def is_gguf(path: Path) -> bool:
    """Returns True if `path` is a file that begins like a GGUF file."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == MAGIC


def read_header(path: Path) -> Header:
    """Returns the header of a GGUF file, which callers must not modify.

    Raises:
        ValueError: If the file is damaged, cut short or of another version.
    """
    status = path.stat()
    return _read_header(path, status.st_ino, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=1)
def _read_header(path: Path, inode: int, mtime_ns: int, size: int) -> Header:
    """Parses a header. The last one is cached, because a load needs it for each part."""
    with open(path, "rb") as file:
        if size < 24 or file.read(4) != MAGIC:
            raise ValueError(f"{path} is not a GGUF file. Download it again.")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Cursor(data, path).header()


class _Cursor:
    """Position in a mapped file."""

    def __init__(self, data: Any, path: Path) -> None:
        self.data, self.path, self.position, self.size = data, path, 4, len(data)

    def header(self) -> Header:
        version = self.number("<u4")
        if version not in VERSIONS:
            raise ValueError(
                f"{self.path} has GGUF version {version}, but versions 2 and 3 in little-endian "
                "byte order are supported. Convert the model again with a current llama.cpp."
            )
        num_tensors = self.count(MIN_TENSOR_INFO)
        metadata: dict[str, Any] = {}
        for _ in range(self.count(MIN_PAIR)):
            key = self.string()
            if key in metadata:
                raise self.damaged(f"holds the key {key!r} twice")
            metadata[key] = self.value(self.number("<u4"))
        infos = [self.tensor_info() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not is_integer(alignment) or alignment < 1:
            raise self.damaged(f"has the alignment {reprlib.repr(alignment)}")
        start = -(-self.position // alignment) * alignment
        tensors = {
            name: dataclasses.replace(info, offset=start + info.offset) for name, info in infos
        }
        if len(tensors) != len(infos):
            raise self.damaged("holds two tensors of one name")
        return Header(metadata, tensors)

    def tensor_info(self) -> tuple[str, TensorInfo]:
        name = self.string()
        num_dimensions = self.number("<u4")
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            raise self.damaged(f"gives {name} {num_dimensions} dimensions")
        shape = tuple(self.number("<u8") for _ in range(num_dimensions))[::-1]
        if not all(shape):
            raise self.damaged(f"gives {name} the shape {shape}")
        return name, TensorInfo(shape, self.number("<u4"), self.number("<u8"))

    def take(self, length: int) -> bytes:
        if length > self.size - self.position:
            raise self.damaged("is cut short")
        self.position += length
        return self.data[self.position - length : self.position]

    def number(self, dtype: str) -> Any:
        return np.frombuffer(self.take(np.dtype(dtype).itemsize), dtype)[0].item()

    def count(self, min_size: int) -> int:
        """Returns a number of items of at least `min_size` bytes each."""
        count = self.number("<u8")
        if count * min_size > self.size - self.position:
            raise self.damaged(f"claims {count} items, more than it can hold")
        return count

    def string(self) -> str:
        (length,) = struct.unpack("<Q", self.take(8))
        return self.take(length).decode("utf-8", errors="replace")

    def value(self, type: int) -> Any:
        if type == STRING:
            return self.string()
        if type in NUMBERS:
            return self.number(NUMBERS[type])
        if type != ARRAY:
            raise self.damaged(f"has a value of the unknown type {type}")
        item_type = self.number("<u4")
        if item_type == STRING:
            return [self.string() for _ in range(self.count(8))]
        if item_type not in NUMBERS:
            raise self.damaged(f"has a list of the unsupported type {item_type}")
        dtype = np.dtype(NUMBERS[item_type])
        return np.frombuffer(self.take(self.count(dtype.itemsize) * dtype.itemsize), dtype)

    def damaged(self, problem: str) -> ValueError:
        return ValueError(f"{self.path} {problem}: the file is damaged. Download it again.")


def size_of(shape: tuple[int, ...], block: int, block_bytes: int) -> int:
    """Returns the bytes of a tensor whose rows are divided into blocks."""
    return math.prod(shape) // block * block_bytes

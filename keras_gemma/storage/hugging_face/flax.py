"""Locates the arrays in a msgpack file of Flax, which are read one by one.

The package `msgpack` would hold the whole file in memory, so its few types are parsed here. The
content of the file:

    map             {name: map or array}
    extension 1     an array: msgpack again, [shape, dtype, bytes]
    a map of parts  an array beyond 1 GiB: {"__msgpack_chunked_array__": true,
                    "shape": {"0": n, …}, "chunks": {"0": flat array, …}}
"""

import dataclasses
import math
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes  # noqa: F401  # gives NumPy the name bfloat16
import numpy as np

from keras_gemma.storage.tensor_streaming import StoredTensor, in_segments

CHUNKED = "__msgpack_chunked_array__"
MAX_DEPTH = 16
"""Maximum depth of maps, far beyond any model."""
MAX_NAME_BYTES = 1000

_ARRAY_EXTENSION = 1

_SHORT = {0x80: "map", 0x90: "array"}
"""Types whose length is in the four low bits of the first byte."""
_SIZED = {
    **{0xC4 + i: ("bytes", 1 << i) for i in range(3)},
    **{0xC7 + i: ("extension", 1 << i) for i in range(3)},
    **{0xCC + i: ("integer", 1 << i) for i in range(4)},
    **{0xD9 + i: ("string", 1 << i) for i in range(3)},
    **{0xDC + i: ("array", 2 << i) for i in range(2)},
    **{0xDE + i: ("map", 2 << i) for i in range(2)},
}
"""Types whose length, or value, follows in this number of bytes."""


@dataclasses.dataclass(frozen=True)
class _Array:
    """Array in a file, with the places of its bytes."""

    shape: tuple[int, ...]
    dtype: str
    segments: tuple[tuple[int, int], ...]
    """Offset and size of each part."""


def tensors(path: Path) -> dict[str, StoredTensor]:
    """Returns all tensors of the file by their names in PyTorch. The file is not kept open."""
    try:
        with open(path, "rb") as file:
            arrays = _flat(_Scanner(file, path.stat().st_size).tree())
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} cannot be read as msgpack of Flax: {error}. Fetch the checkpoint again."
        ) from error
    return {torch_name(name): _tensor(path, name, array) for name, array in arrays.items()}


def torch_name(name: str) -> str:
    """Returns PyTorch's name of a parameter: `"model/norm/scale"` is `"model.norm.weight"`."""
    module, _, leaf = name.rpartition("/")
    leaf = "weight" if leaf in ("kernel", "embedding", "scale") else leaf
    return f"{module}/{leaf}".lstrip("/").replace("/", ".")


def _tensor(path: Path, name: str, array: _Array) -> StoredTensor:
    stored = in_segments(path, array.segments, array.shape, array.dtype)
    if name.endswith("/kernel"):  # [in, out] in Flax
        return StoredTensor(array.shape[::-1], array.dtype, lambda: stored.read().T)
    return stored


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, _Array]:
    """Returns the arrays by the names of their maps, joined with slashes."""
    arrays: dict[str, _Array] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            arrays |= _flat(value, f"{prefix}{name}/")
        elif isinstance(value, _Array):
            arrays[f"{prefix}{name}"] = value
        else:
            raise ValueError(f"{prefix}{name} is not an array")
    return arrays


@dataclasses.dataclass
class _Scanner:
    """Reads the structure of a file and skips the bytes of its arrays."""

    file: BinaryIO
    size: int

    def tree(self) -> dict[str, Any]:
        """Returns the nested maps of the file, with an `_Array` for each array."""
        tree = self._map(self._header("map"), 0)
        if not isinstance(tree, dict) or self.file.tell() != self.size:
            raise ValueError("it holds more than a map of parameters")
        return tree

    def _map(self, count: int, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError(f"its maps are nested more than {MAX_DEPTH} deep")
        values: dict[str, Any] = {}
        for _ in range(count):
            name = self._string()
            if name in values:
                raise ValueError(f"{name!r} is in a map twice")
            kind, length = self._any_header()
            if kind == "map":
                values[name] = self._map(length, depth + 1)
            elif kind == "extension":
                values[name] = self._array(length)
            elif kind in ("integer", "true"):  # parts of a chunked array
                values[name] = length
            else:
                raise ValueError(f"{name!r} is a value of the kind {kind}, not an array")
        return _join(values) if CHUNKED in values else values

    def _array(self, length: int) -> _Array:
        code = self._bytes(1)[0]
        end = self.file.tell() + length
        if code != _ARRAY_EXTENSION:
            raise ValueError(f"it holds a value of the extension {code}, which is not an array")
        if self._header("array") != 3:
            raise ValueError("an array has no shape, dtype and bytes")
        shape = tuple(self._header("integer") for _ in range(self._header("array")))
        dtype = self._string()
        size = self._header("bytes")
        start = self.file.tell()
        if start + size != end or end > self.size or math.prod(shape) * _itemsize(dtype) != size:
            raise ValueError(f"it is cut short, or an array of shape {shape} is damaged")
        self.file.seek(end)
        return _Array(shape, dtype, ((start, size),))

    def _string(self) -> str:
        length = self._header("string")
        if length > MAX_NAME_BYTES:
            raise ValueError(f"it has a name of {length} bytes")
        return self._bytes(length).decode()

    def _header(self, expected: str) -> int:
        """Returns the length, or an integer's value, of the next value."""
        kind, length = self._any_header()
        if kind != expected:
            raise ValueError(f"it holds a value of the kind {kind} in place of {expected}")
        return length

    def _any_header(self) -> tuple[str, int]:
        first = self._bytes(1)[0]
        if first < 0x80:
            return "integer", first
        if first < 0xA0:
            return _SHORT[first & 0xF0], first & 0x0F
        if first < 0xC0:
            return "string", first & 0x1F
        if first == 0xC3:
            return "true", 1
        if 0xD4 <= first <= 0xD8:
            return "extension", 1 << (first - 0xD4)
        if first not in _SIZED:
            return f"{first:#x}", 0
        kind, count = _SIZED[first]
        return kind, int.from_bytes(self._bytes(count), "big")

    def _bytes(self, count: int) -> bytes:
        data = self.file.read(count)
        if len(data) < count:
            raise ValueError("it is cut short")
        return data


def _itemsize(dtype: str) -> int:
    try:
        return np.dtype(dtype).itemsize
    except TypeError as error:
        raise ValueError(f"it holds an array of the unknown dtype {dtype!r}") from error


def _join(values: dict[str, Any]) -> _Array:
    """Returns the array that a map of parts describes."""
    sizes, parts = values.get("shape"), values.get("chunks")
    if not isinstance(sizes, dict) or not isinstance(parts, dict) or not parts:
        raise ValueError("an array in parts has no shape or no parts")
    shape = tuple(sizes.get(str(i)) for i in range(len(sizes)))
    arrays = [parts.get(str(i)) for i in range(len(parts))]
    if not all(isinstance(size, int) for size in shape) or not all(
        isinstance(array, _Array) and array.dtype == arrays[0].dtype for array in arrays
    ):
        raise ValueError("an array in parts has other values than sizes and arrays")
    if math.prod(shape) != sum(math.prod(array.shape) for array in arrays):
        raise ValueError(f"the parts of an array of shape {shape} have another size")
    return _Array(shape, arrays[0].dtype, tuple(s for array in arrays for s in array.segments))

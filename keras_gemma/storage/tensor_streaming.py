"""Checks the tensors of a checkpoint against a model's weights, then streams them one by one.

Knows the names and shapes of `GemmaConfig.weight_shapes()` and of a file's tensors, and the
`TensorSpec` that joins them. Does not know any file format: readers pass in `StoredTensor`s.
"""

import contextlib
import dataclasses
import math
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from keras_gemma import backend, progress

READ_AHEAD = 2
"""Maximum number of tensors read concurrently, each by its own thread."""

OVERFLOW_CHUNK = 1 << 18
"""Elements checked for overflow at a time; few enough for the processor's cache."""

MAX_LAYERS = 1000
"""Maximum number of layers that a description may ask for, far beyond any Gemma.

Without a limit, a damaged file would be expanded layer by layer before it is found invalid.
"""

FLOAT_DTYPES = ("float64", "float32", "bfloat16", "float16")
MAX_LISTED_PROBLEMS = 50


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not read yet."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[..., np.ndarray]
    reads_as: bool = False
    """True if `read` takes the dtype that the array shall have, which saves memory."""


def in_file(path: Path, offset: int, shape: tuple[int, ...], dtype: str) -> StoredTensor:
    """Returns a tensor that is stored contiguously in `path` from byte `offset`.

    The tensor is read, not mapped: a mapped file would count twice as the process's memory.
    """

    def read() -> np.ndarray:
        array = backend.empty(shape, dtype)
        rest = memoryview(array.reshape(-1).view("uint8"))
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            while rest:
                count = file.readinto(rest)
                if not count:
                    raise ValueError(f"{path} is cut short. Fetch or save the checkpoint again.")
                rest = rest[count:]
        return array

    return StoredTensor(shape, dtype, read)


def _identity(array: np.ndarray) -> np.ndarray:
    return array


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Name and shape of a weight in a checkpoint, and the conversion between layouts."""

    name: str
    shape: tuple[int, ...]
    to_logical: Callable[[np.ndarray], np.ndarray] = _identity
    to_stored: Callable[[np.ndarray], np.ndarray] = _identity
    padding_rows: int = 0
    """Maximum number of rows that the stored tensor may have beyond `shape`; not read."""
    dtypes: tuple[str, ...] = FLOAT_DTYPES
    """Dtypes that the stored tensor may have."""

    @property
    def tensors(self) -> tuple["TensorSpec", ...]:
        """Specs of the weight's stored tensors: only this one."""
        return (self,)

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Returns True if a stored tensor of this shape fits."""
        if shape == self.shape:
            return True
        return (
            self.padding_rows > 0
            and len(shape) == len(self.shape)
            and shape[1:] == self.shape[1:]
            and self.shape[0] < shape[0] <= self.shape[0] + self.padding_rows
        )


@dataclasses.dataclass(frozen=True)
class QuantizedTensorSpec:
    """Names and shapes of the arrays of a quantized weight, in their plain form."""

    parts: backend.Quantized
    """A `TensorSpec` for each array, or `None`."""

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """Specs of the weight's stored tensors."""
        return tuple(part for part in self.parts if part is not None)


def check_layer_count(count: Any, source: Path) -> None:
    """Checks that a description does not ask for more layers than any model has.

    Raises:
        ValueError: If `count` is greater than `MAX_LAYERS`.
    """
    if isinstance(count, int) and count > MAX_LAYERS:
        raise ValueError(
            f"{source} asks for {count} layers, and at most {MAX_LAYERS} are supported: it is "
            "damaged. "
            "Fetch or save it again."
        )


def check(
    stored: Mapping[str, StoredTensor],
    specs: Mapping[str, TensorSpec | QuantizedTensorSpec],
    source: Any,
    ignored: Collection[str] = (),
) -> None:
    """Compares the tensors of a checkpoint with those the model needs, without reading any.

    Args:
        stored: Tensors of the checkpoint, by their names in it.
        specs: For each weight of the model, its spec in the checkpoint.
        source: Path of the checkpoint, for the message.
        ignored: Names in the checkpoint that are not weights of the model but harmless.

    Raises:
        ValueError: If tensors are missing, unexpected, of another shape or not floating point. The
            message lists all of them.
    """
    problems = []
    expected = [spec for whole in specs.values() for spec in whole.tensors]
    for spec in expected:
        tensor = stored.get(spec.name)
        if tensor is None:
            problems.append(f"missing: {spec.name} {spec.shape}")
        elif not spec.accepts(tensor.shape):
            problems.append(f"shape: {spec.name} is {tensor.shape}, expected {spec.shape}")
        elif tensor.dtype not in spec.dtypes:
            kind = "a float" if spec.dtypes == FLOAT_DTYPES else " or ".join(spec.dtypes)
            problems.append(f"dtype: {spec.name} is {tensor.dtype}, expected {kind}")
    names = {spec.name for spec in expected} | set(ignored)
    problems += [f"unexpected: {n} {t.shape}" for n, t in stored.items() if n not in names]
    if problems:
        raise ValueError(
            f"The tensors in {source} do not fit its config.json "
            f"({len(problems)} problems). Use the config.json that these weights were saved "
            f"with, or save them again:{_format_problems(problems)}"
        )


def join_shards(
    shards: Mapping[str, Mapping[str, StoredTensor]],
    index: Mapping[str, Collection[str]],
    source: Path,
    entry_of: Callable[[str], str] = lambda name: name,
    ignored: Collection[str] = (),
) -> dict[str, StoredTensor]:
    """Returns the tensors of all shards by name, after comparing the shards with their index.

    Args:
        shards: Tensors of each file, by file name.
        index: File names of each entry, by entry.
        source: Path of the index, for the message.
        entry_of: Maps a tensor's name to its entry, if an entry is a group of tensors.
        ignored: Tensors that the index may leave out.

    Raises:
        ValueError: If the index and the files disagree, or two files hold the same tensor. The
            message lists all such tensors.
    """
    indexed = {(entry, file) for entry, files in index.items() for file in files}
    stored = {(entry_of(name), file) for file, tensors in shards.items() for name in tensors}
    count = Counter(name for tensors in shards.values() for name in tensors)
    problems = [f"named, but not held: {e} in {f}" for e, f in sorted(indexed - stored)]
    problems += [
        f"held, but not named: {e} in {f}" for e, f in sorted(stored - indexed) if e not in ignored
    ]
    problems += [f"held {n} times: {name}" for name, n in sorted(count.items()) if n > 1]
    if problems:
        raise ValueError(
            f"{source} and the tensors in its files do not agree ({len(problems)} problems). "
            f"Fetch or save the checkpoint again:{_format_problems(problems)}"
        )
    return {name: tensor for tensors in shards.values() for name, tensor in tensors.items()}


def _format_problems(problems: list[str]) -> str:
    """Formats the first problems, each on its own line."""
    rest = len(problems) - MAX_LISTED_PROBLEMS
    lines = problems[:MAX_LISTED_PROBLEMS] + ([f"… and {rest} more"] if rest > 0 else [])
    return "".join(f"\n  {line}" for line in lines)


def stream(
    stored: Mapping[str, StoredTensor],
    specs: Mapping[str, TensorSpec | QuantizedTensorSpec],
    weights: Mapping[str, Any],
) -> None:
    """Reads each tensor once, straight into the memory of its weight.

    A few threads read ahead of the assigning thread, at most `READ_AHEAD` tensors at a time.

    Args:
        stored: Tensors of the checkpoint, already checked.
        specs: For each weight, its spec in the checkpoint.
        weights: `backbone.named_weights()`; all of them are assigned.

    Raises:
        ValueError: If a file is cut short, or a number is too large for float16 weights.
    """

    def prepare(name: str) -> Any:
        spec = specs[name]
        if isinstance(spec, QuantizedTensorSpec):
            arrays = (None if part is None else stored[part.name].read() for part in spec.parts)
            return weights[name].pack_plain_form(backend.Quantized(*arrays))
        tensor = stored[spec.name]
        array = tensor.read(weights[name].dtype) if tensor.reads_as else tensor.read()
        if spec.padding_rows:
            array = array[: spec.shape[0]]
        narrows = weights[name].dtype == "float16" and array.dtype != "float16"
        with np.errstate(over="ignore") if narrows else contextlib.nullcontext():
            packed = weights[name].pack(spec.to_logical(array))
        if narrows and _overflows(packed):
            raise ValueError(
                f"{spec.name} holds numbers beyond float16, whose largest is 65504. Load with "
                "`dtype='bfloat16'` or `dtype='float32'`."
            )
        return packed

    sizes = {name: math.prod(weight.shape) for name, weight in weights.items()}
    # The largest first, while memory is free.
    names = sorted(weights, key=sizes.__getitem__, reverse=True)
    with (
        ThreadPoolExecutor(READ_AHEAD) as pool,
        progress.bar("Loading", sum(sizes.values())) as advance,
    ):
        ahead = deque(pool.submit(prepare, name) for name in names[:READ_AHEAD])
        for i, name in enumerate(names):
            packed = ahead.popleft().result()
            if i + READ_AHEAD < len(names):
                ahead.append(pool.submit(prepare, names[i + READ_AHEAD]))
            weights[name].take(packed)
            advance(sizes[name])


def _overflows(array: np.ndarray) -> bool:
    """Returns True if a contiguous float16 array holds an infinity, tested by its bits."""
    bits = array.reshape(-1).view("uint16")
    starts = range(0, bits.size, OVERFLOW_CHUNK)
    return any(((bits[i : i + OVERFLOW_CHUNK] & 0x7FFF) == 0x7C00).any() for i in starts)

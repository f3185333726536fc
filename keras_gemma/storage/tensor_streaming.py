"""Checks the tensors of a checkpoint against a model's weights, then streams them one by one.

Knows the names and shapes of `GemmaConfig.weight_shapes()` and of a file's tensors, and the
`TensorSpec` that joins them. Does not know any file format: readers pass in `StoredTensor`s.
"""

import contextlib
import dataclasses
import math
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
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
    plain_rows: Callable[[slice], backend.Quantized] | None = None
    """Returns the plain form of some rows, if the tensor is quantized in a known type."""
    float_rows: Callable[[slice], np.ndarray] | None = None
    """Returns some rows in float32, if a large matrix should be quantized in chunks.

    Only for tensors with the layout of their weight, because `TensorSpec.to_logical` is not called.
    """


@dataclasses.dataclass(frozen=True)
class _MatrixInFile:
    """Matrix whose rows are read when they are indexed."""

    shape: tuple[int, ...]
    read_rows: Callable[[slice], np.ndarray]

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.read_rows(rows)


def in_file(path: Path, offset: int, shape: tuple[int, ...], dtype: str) -> StoredTensor:
    """Returns a tensor that is stored contiguously in `path` from byte `offset`."""
    return in_segments(path, [(offset, None)], shape, dtype)


def in_segments(
    path: Path, segments: Sequence[tuple[int, int | None]], shape: tuple[int, ...], dtype: str
) -> StoredTensor:
    """Returns a tensor whose bytes are in segments of `path`, given by offset and size.

    A size of `None`, for the last segment, takes the rest of the tensor. The tensor is read, not
    mapped: a mapped file would count twice as the process's memory.
    """

    def read() -> np.ndarray:
        array = backend.empty(shape, dtype)
        memory = memoryview(array.reshape(-1).view("uint8"))
        with open(path, "rb", buffering=0) as file:
            for offset, size in segments:
                file.seek(offset)
                rest, memory = memory[:size], memory[size or 0 :]
                while rest:
                    count = file.readinto(rest)
                    if not count:
                        raise ValueError(
                            f"{path} is cut short. Fetch or save the checkpoint again."
                        )
                    rest = rest[count:]
        return array

    return StoredTensor(shape, dtype, read)


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Name and shape of a weight in a checkpoint, and the conversion between layouts."""

    name: str
    shape: tuple[int, ...]
    to_logical: Callable[[np.ndarray], np.ndarray] = lambda array: array
    to_stored: Callable[[np.ndarray], np.ndarray] = lambda array: array
    padding_rows: int = 0
    """Maximum number of rows that the stored tensor may have beyond `shape`; not read."""
    dtypes: tuple[str, ...] = FLOAT_DTYPES
    """Dtypes that the stored tensor may have."""
    as_stored: bool = False
    """True if the weight keeps the quantized numbers of the tensor, read by `plain_rows`."""

    @property
    def tensors(self) -> tuple["TensorSpec", ...]:
        """Specs of the weight's stored tensors: only this one."""
        return (self,)

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Returns True if a stored tensor of this shape fits."""
        return (
            len(shape) == len(self.shape)
            and shape[1:] == self.shape[1:]
            and 0 <= shape[0] - self.shape[0] <= self.padding_rows
        )


def per_head_spec(name: str, shape: tuple[int, int], kind: str, head_dim: int) -> TensorSpec:
    """Returns the spec of a matrix that is stored with an axis of heads, as in JAX and KerasHub.

    query [N·H, D] <-> [N, D, H], key and value with K for N, output [D, N·H] <-> [N, H, D].
    """
    if kind == "output":
        d, heads = shape
        return TensorSpec(
            name,
            (heads // head_dim, head_dim, d),
            to_logical=lambda array: array.reshape(-1, d).T,
            to_stored=lambda array: array.T.reshape(-1, head_dim, d),
        )
    heads, d = shape
    return TensorSpec(
        name,
        (heads // head_dim, d, head_dim),
        to_logical=lambda array: backend.as_aligned(array.transpose(0, 2, 1)).reshape(-1, d),
        to_stored=lambda array: array.reshape(-1, head_dim, d).transpose(0, 2, 1),
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


Specs = Mapping[str, TensorSpec | QuantizedTensorSpec]
"""Spec of each weight of a model in a checkpoint, by the weight's logical name."""


def check_layer_count(count: Any, source: Path) -> None:
    """Checks that a description does not ask for more layers than any model has."""
    if isinstance(count, int) and count > MAX_LAYERS:
        raise ValueError(
            f"{source} asks for {count} layers, and at most {MAX_LAYERS} are supported: it is "
            "damaged. Fetch or save it again."
        )


def check(stored: Mapping[str, StoredTensor], specs: Specs, source: Any) -> None:
    """Compares the tensors of a checkpoint with those the model needs, without reading any."""
    report_problems(
        compare(stored, [spec for whole in specs.values() for spec in whole.tensors]),
        f"The tensors in {source} do not fit the sizes of the model",
        "Use the config.json that these weights were saved with, or fetch them again",
    )


def compare(stored: Mapping[str, StoredTensor], specs: Sequence[TensorSpec]) -> list[str]:
    """Returns the stored tensors that are missing, unexpected, or of another shape or dtype."""
    problems = []
    for spec in specs:
        tensor = stored.get(spec.name)
        if tensor is None:
            problems.append(f"missing: {spec.name} {spec.shape}")
        elif not spec.accepts(tensor.shape):
            problems.append(f"shape: {spec.name} is {tensor.shape}, expected {spec.shape}")
        elif tensor.dtype not in spec.dtypes:
            kind = "a float" if spec.dtypes == FLOAT_DTYPES else " or ".join(spec.dtypes)
            problems.append(f"dtype: {spec.name} is {tensor.dtype}, expected {kind}")
    names = {spec.name for spec in specs}
    return problems + [f"unexpected: {n} {t.shape}" for n, t in stored.items() if n not in names]


def report_problems(problems: list[str], claim: str, remedy: str) -> None:
    """Raises a `ValueError` that lists the first problems, if there are any."""
    if problems:
        rest = len(problems) - MAX_LISTED_PROBLEMS
        lines = problems[:MAX_LISTED_PROBLEMS] + ([f"… and {rest} more"] if rest > 0 else [])
        listed = "".join(f"\n  {line}" for line in lines)
        raise ValueError(f"{claim} ({len(problems)} problems). {remedy}:{listed}")


def join_shards(
    shards: Mapping[str, Mapping[str, StoredTensor]],
    index: Mapping[str, Collection[str]],
    source: Path,
    entry_of: Callable[[str], str] = lambda name: name,
    ignored: Collection[str] = (),
) -> dict[str, StoredTensor]:
    """Returns the tensors of all shards by name, after comparing the shards with their index.

    `shards` has the tensors of each file, `index` the files of each entry. `entry_of` maps a
    tensor's name to its entry, if an entry is a group of tensors. The index may leave out `ignored`
    tensors.
    """
    indexed = {(entry, file) for entry, files in index.items() for file in files}
    stored = {(entry_of(name), file) for file, tensors in shards.items() for name in tensors}
    count = Counter(name for tensors in shards.values() for name in tensors)
    problems = [f"named, but not held: {e} in {f}" for e, f in sorted(indexed - stored)]
    problems += [
        f"held, but not named: {e} in {f}" for e, f in sorted(stored - indexed) if e not in ignored
    ]
    problems += [f"held {n} times: {name}" for name, n in sorted(count.items()) if n > 1]
    report_problems(
        problems,
        f"{source} and the tensors in its files do not agree",
        "Fetch or save the checkpoint again",
    )
    return {name: tensor for tensors in shards.values() for name, tensor in tensors.items()}


def stream(stored: Mapping[str, StoredTensor], specs: Specs, weights: Mapping[str, Any]) -> None:
    """Reads each checked tensor once, straight into the memory of its weight.

    A few threads read ahead of the assigning thread, at most `READ_AHEAD` tensors at a time.
    `weights` is `backbone.named_weights()`.
    """

    def prepare(name: str) -> Any:
        spec = specs[name]
        if isinstance(spec, QuantizedTensorSpec):
            arrays = (None if part is None else stored[part.name].read() for part in spec.parts)
            return weights[name].pack_plain_form(backend.Quantized(*arrays))
        tensor = stored[spec.name]
        if spec.as_stored:
            return weights[name].pack_plain_rows(tensor.plain_rows)
        if tensor.float_rows is not None and weights[name].dtype not in FLOAT_DTYPES:
            return weights[name].pack(_MatrixInFile(tensor.shape, tensor.float_rows))
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

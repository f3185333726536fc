"""The work that differs from framework to framework, behind one contract.

Keras's chosen backend decides which module serves; it is chosen once, here. Shapes are in the
alphabet of `keras_gemma.config`. A weight is *packed* when it is stored: the module picks the
layout that its compiler reads fastest, and nothing above this folder knows it.

    packed_shape(shape, kind)          the shape a weight is stored in
    empty(shape, dtype)                host memory for a weight that is about to be read
    settle(array, dtype)               an array in such memory: itself, or a copy
    pack(weight, kind, dtype)          NumPy `[out, in]` -> NumPy in the stored layout and dtype,
                                       the same memory where nothing has to change
    unpack(packed, shape)              the way back
    to_numpy(tensor)                   what a variable holds, copied to the host
    uninitialized()                    within it, new variables take no memory, until
    assign(variable, packed)           gives one a packed weight, whose memory it takes over where
                                       the framework can
    matmul(x, packed)                  `[..., in]` -> `[..., out]`
    matmul_back(y, packed)             `[..., out]` -> `[..., in]`, the gradient of a product
    embed(ids, packed, dtype)          `[...]` -> `[..., D]`, rows of a packed embedding
    quantized_spec, quantized_pack,    what the first and the next two of these are to a weight in
    quantized_unpack                   8 or 4 bits (`quantized.py`); `matmul` and `embed` take both
    attend(q, k, v, mask, scale, cap)  `[B, T, N, H]`, soft cap and mask included
    cross_entropy(products, ids, cap)  losses `[...]`, hits, and the gradient by `products [..., V]`
    map(function, arrays)              `function` of each element along the first axis, in order
    write_cache(cache, new, slots)     `[B, R, K, H]` with `new [B, T, K, H]` at `slots [B, T]`,
                                       in place where the framework can
    compile(program, donate=None)      a whole program; it may use up its argument `donate`
    fuse(function)                     `(x, weights, ...)`, a part that a program calls many times
    leaf(x)                            `x` as a constant that gradients can be asked for
    loop(proceed, step)                -> a function of (weights, state, limit): `step(weights,
                                       state)` while `proceed(state)`, at most `limit` times
    free_memory()                      bytes left on the device, or None where nobody says
    peak_device_memory()               bytes at most on an accelerator so far; None on CPU
    memory_bandwidth()                 bytes/s that plain reading reaches on this machine

`reference.py` says what matmul, embed, attend, cross_entropy, map and write_cache mean, in
`keras.ops` alone; the tests compare every backend with it.
"""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_gemma.backend import uninitialized as _uninitialized
from keras_gemma.backend.packing import empty, settle
from keras_gemma.backend.quantized import Quantized

_name = keras.config.backend()

if _name == "jax":
    from keras_gemma.backend import jax as _module
elif _name == "torch":
    from keras_gemma.backend import torch as _module
elif _name == "tensorflow":
    from keras_gemma.backend import tensorflow as _module
else:
    raise ImportError(
        f"keras_gemma runs on the Keras backends jax, torch and tensorflow. Received: {_name!r}. "
        "Set KERAS_BACKEND to one of them before Keras is imported."
    )

WIDENED = 1 << 15
"""Rows of a quantized embedding that stand in floating point at once for a gradient."""

SLAB = 1 << 22
"""Numbers of a weight that are quantized and packed at a time, a hundred megabytes at most."""

ROWS_TOGETHER = 64
"""Rows that no layout parts from one another."""

uninitialized = _uninitialized.uninitialized
packed_shape = _module.packed_shape
pack = _module.pack
peak_device_memory = _module.peak_device_memory
unpack = _module.unpack
to_numpy = _module.to_numpy
attend = _module.attend
write_cache = _module.write_cache
compile = _module.compile
cross_entropy = _module.cross_entropy
fuse = _module.fuse
leaf = _module.leaf
loop = _module.loop
map = _module.map
free_memory = _module.free_memory
memory_bandwidth = _module.memory_bandwidth


def quantized_spec(
    shape: tuple[int, int], kind: str, bits: int, group_size: int, zeros: bool = False
) -> Quantized:
    """Shape and dtype of each array that a weight `[out, in]` in 8 or 4 bits is stored in."""
    return _module.quantized_layout().spec(shape, kind, bits, group_size, zeros)


def quantized_pack(plain: Quantized, kind: str, bits: int) -> Quantized:
    """NumPy arrays in the plain form -> in the stored layout."""
    return _module.quantized_layout().pack(plain, kind, bits)


def quantized_pack_rows(
    shape: tuple[int, int],
    kind: str,
    bits: int,
    group_size: int,
    zeros: bool,
    plain_rows: Callable[[slice], Quantized],
) -> Quantized:
    """A weight `[out, in]` in the stored layout, with a slab of its plain form at a time.

    Args:
        plain_rows: the plain form of some rows; slabs are asked for from the first to the last.
    """
    out, length = shape
    rows = max(1, SLAB // length // ROWS_TOGETHER) * ROWS_TOGETHER
    if out <= rows or out % ROWS_TOGETHER:
        return quantized_pack(plain_rows(slice(None)), kind, bits)
    spec = quantized_spec(shape, kind, bits, group_size, zeros)
    packed = Quantized(*(entry and empty(*entry) for entry in spec))
    for start in range(0, out, rows):
        slab = quantized_pack(plain_rows(slice(start, start + rows)), kind, bits)
        for whole, part in zip(packed, slab, strict=True):
            if part is not None:
                # The axis that goes along `out` is the one that is longer in the whole.
                axis = next(i for i, n in enumerate(part.shape) if n != whole.shape[i])
                first = whole.shape[axis] * start // out
                whole.swapaxes(0, axis)[first : first + part.shape[axis]] = part.swapaxes(0, axis)
    return packed


def quantized_unpack(packed: Quantized, shape: tuple[int, int]) -> Quantized:
    """The way back."""
    return _module.quantized_layout().unpack(packed, shape)


def matmul(x: Any, packed: Any) -> Any:
    """`x [..., in]` times a packed weight `[out, in]`, of whatever bits -> `[..., out]`."""
    product = _module.quantized_matmul if isinstance(packed, Quantized) else _module.matmul
    return product(x, packed)


def matmul_back(y: Any, packed: Any) -> Any:
    """`y [..., out]` times an embedding `[out, in]`, of whatever bits -> `[..., in]`.

    What the gradient of `matmul` is by its first factor, where that of the second is not asked for.
    """
    if not isinstance(packed, Quantized):
        return _module.matmul_back(y, packed)
    dtype, total = keras.backend.standardize_dtype(y.dtype), 0.0
    for start in range(0, y.shape[-1], WIDENED):
        ids = ops.arange(start, min(start + WIDENED, y.shape[-1]), dtype="int32")
        part = _module.matmul_back(y[..., start : start + WIDENED], embed(ids, packed, dtype))
        total = total + ops.cast(part, "float32")
    return ops.cast(total, dtype)


def embed(ids: Any, packed: Any, dtype: str) -> Any:
    """Rows `ids [...]` of a packed embedding `[V, D]`, of whatever bits -> `[..., D]`."""
    if isinstance(packed, Quantized):
        return _module.quantized_layout().embed(ids, packed, dtype)
    return _module.embed(ids, packed)


def assign(variable: keras.Variable, packed: np.ndarray) -> None:
    """Give `variable` a packed weight of its dtype, which must not be changed afterwards."""
    _uninitialized.assign(variable, _module.adopt(packed))


__all__ = [
    "Quantized",
    "assign",
    "attend",
    "compile",
    "cross_entropy",
    "embed",
    "empty",
    "free_memory",
    "fuse",
    "leaf",
    "loop",
    "map",
    "matmul",
    "matmul_back",
    "memory_bandwidth",
    "pack",
    "packed_shape",
    "peak_device_memory",
    "quantized_pack",
    "quantized_pack_rows",
    "quantized_spec",
    "quantized_unpack",
    "settle",
    "to_numpy",
    "uninitialized",
    "unpack",
    "write_cache",
]

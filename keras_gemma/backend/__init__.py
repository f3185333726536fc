"""Operations that differ between frameworks, behind one contract.

This module selects the implementation once, by Keras's backend. Shapes use the alphabet of
`keras_gemma.config`. A stored weight is *packed*: each implementation chooses the layout that its
compiler reads fastest, and nothing above this folder knows that layout.

    packed_shape(shape, kind)          shape of a stored weight
    empty(shape, dtype)                aligned host memory for a weight
    as_aligned(array, dtype)           the array itself if it is aligned, otherwise an aligned copy
    pack(weight, kind, dtype)          NumPy `[out, in]` -> NumPy in the stored layout and dtype,
                                       without a copy if nothing has to change
    unpack(packed, shape)              inverse of `pack`
    to_numpy(tensor)                   copy of a tensor in host memory
    uninitialized()                    context manager: new variables allocate no memory until
    assign(variable, packed)           gives a variable a packed weight, and shares its memory if
                                       the framework can
    matmul(x, packed)                  `[..., in]` -> `[..., out]`
    matmul_transposed(y, packed)       `[..., out]` -> `[..., in]`, the gradient of `matmul`
    embed(ids, packed, dtype)          `[...]` -> `[..., D]`, rows of a packed embedding
    quantized_spec, quantized_pack,    counterparts of `packed_shape`, `pack` and `unpack` for int8
    quantized_unpack                   and int4 weights (`quantized.py`), which `matmul` and `embed`
                                       also accept
    attend(q, k, v, mask, scale, cap)  attention with soft cap and mask -> `[B, T, N, H]`
    log_sum_and_max(products, cap)     log of the sum of exp(logit), and the largest logit, `[R]`
                                       each, of `products [R, V]`
    cross_entropy(products, ids, cap)  losses `[...]`, hits, and the gradient of `products [..., V]`
    map(function, arrays)              `function` of each element along the first axis, in order
    write_cache(cache, new, slots)     writes `new [B, T, K, H]` to `slots [B, T]` of a cache
                                       `[B, R, K, H]`, in place if the framework can
    insert_row(array, row, at)         writes `row [1, ...]` to index `at` of `array [B, ...]`, in
                                       place if the framework can
    compile(program, donate=None)      compiles a whole program, which may overwrite the argument
                                       number `donate`
    compile_step(step, donate=None)    same for a program that runs for every token: it is compiled
                                       for the fewest loops, which takes longer
    jit_part(function)                 compiles a part `(x, weights, ...)` that a program calls many
                                       times
    requires_grad(x)                   `x` detached from its graph, with gradients enabled
    while_loop(cond, step)             -> function of (weights, state, limit) that runs
                                       `step(weights, state)` while `cond(state)`, at most
                                       `limit` times
    free_memory()                      free bytes on the device; `None` if unknown
    peak_device_memory()               peak bytes on an accelerator; `None` on CPU
    release_threads()                  ends the threads of parallel loops that the calling thread
                                       has run, which would slow down those of another thread
    memory_bandwidth()                 measured read bandwidth of this machine, in bytes/s

`reference.py` implements matmul, embed, attend, log_sum_and_max, cross_entropy, map, write_cache
and insert_row in plain `keras.ops`. The tests compare every backend with it. `jax/`, `tensorflow/`
and `torch/` implement the contract, with kernels for CPU in their `cpu.py`. `xla_cpu/` has kernels
that JAX and TensorFlow share.
"""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_gemma.backend import keras_internals, packing
from keras_gemma.backend.packing import as_aligned, empty
from keras_gemma.backend.quantized import Layout, Quantized

_name = keras.config.backend()

if _name == "jax":
    from keras_gemma.backend import jax as _module
elif _name == "torch":
    from keras_gemma.backend import torch as _module
elif _name == "tensorflow":
    from keras_gemma.backend import tensorflow as _module
else:
    raise ImportError(
        "keras_gemma supports the Keras backends jax, torch and tensorflow. Set KERAS_BACKEND to "
        f"one of them before importing Keras. Received: {_name!r}"
    )

DEQUANTIZED_ROWS = 1 << 15
"""Rows of a quantized embedding that are dequantized at a time for a gradient."""

MAX_CHUNK_ELEMENTS = 1 << 22
"""Numbers of a weight that are quantized and packed at a time, at most a hundred megabytes."""

ROW_ALIGNMENT = 64
"""Rows that every layout keeps together."""

uninitialized = keras_internals.uninitialized
unpack = packing.unpack
to_numpy = _module.to_numpy
attend = _module.attend
write_cache = _module.write_cache
insert_row = _module.insert_row
compile = _module.compile
compile_step = _module.compile_step
cross_entropy = _module.cross_entropy
log_sum_and_max = _module.log_sum_and_max
jit_part = _module.jit_part
requires_grad = _module.requires_grad
while_loop = _module.while_loop
map = _module.map
free_memory = _module.free_memory
peak_device_memory = _module.peak_device_memory
memory_bandwidth = _module.memory_bandwidth
release_threads = _module.release_threads


def _has_blocks() -> bool:
    return _name != "torch" and _module.on_cpu()


def packed_shape(shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
    return packing.packed_shape(shape, kind) if _has_blocks() else shape


def pack(weight: np.ndarray, kind: str, dtype: Any = None) -> np.ndarray:
    return packing.pack(weight, kind, dtype) if _has_blocks() else as_aligned(weight, dtype)


def quantized_spec(shape: tuple[int, int], kind: str, layout: Layout) -> Quantized:
    return _module.quantized_layout().spec(shape, kind, layout)


def quantized_pack(plain: Quantized, kind: str, bits: int) -> Quantized:
    return _module.quantized_layout().pack(plain, kind, bits)


def quantized_pack_rows(
    shape: tuple[int, int],
    kind: str,
    layout: Layout,
    plain_rows: Callable[[slice], Quantized],
) -> Quantized:
    """Packs a weight `[out, in]` in chunks. `plain_rows` returns the plain form of some rows."""
    out, length = shape
    rows = max(1, MAX_CHUNK_ELEMENTS // length // ROW_ALIGNMENT) * ROW_ALIGNMENT
    if out <= rows or out % ROW_ALIGNMENT:
        return quantized_pack(plain_rows(slice(None)), kind, layout.bits)
    spec = quantized_spec(shape, kind, layout)
    packed = spec.map(lambda entry: empty(*entry))
    for start in range(0, out, rows):
        chunk = quantized_pack(plain_rows(slice(start, start + rows)), kind, layout.bits)
        for whole, part in zip(packed, chunk, strict=True):
            if part is not None:
                # `out` is the only axis that is longer in the whole.
                axis = next(i for i, n in enumerate(part.shape) if n != whole.shape[i])
                first = whole.shape[axis] * start // out
                whole.swapaxes(0, axis)[first : first + part.shape[axis]] = part.swapaxes(0, axis)
    return packed


def quantized_unpack(packed: Quantized, shape: tuple[int, int], layout: Layout) -> Quantized:
    plain = _module.quantized_layout().unpack(packed, shape)
    if not plain.has_groups:
        return plain
    # A layout may store the arrays of groups in a wider dtype.
    of_groups = plain._replace(values=None).map(lambda array: array.astype(layout.scale_dtype))
    return of_groups._replace(values=plain.values)


def matmul(x: Any, packed: Any) -> Any:
    """Multiplies `x [..., in]` by a packed weight `[out, in]` -> `[..., out]`."""
    product = _module.quantized_matmul if isinstance(packed, Quantized) else _module.matmul
    return product(x, packed)


def matmul_transposed(y: Any, packed: Any) -> Any:
    """Multiplies `y [..., out]` by a transposed embedding `[out, in]` -> `[..., in]`."""
    if not isinstance(packed, Quantized):
        return _module.matmul_transposed(y, packed)
    dtype, total = keras.backend.standardize_dtype(y.dtype), 0.0
    for start in range(0, y.shape[-1], DEQUANTIZED_ROWS):
        stop = min(start + DEQUANTIZED_ROWS, y.shape[-1])
        rows = embed(ops.arange(start, stop, dtype="int32"), packed, dtype)
        part = _module.matmul_transposed(y[..., start:stop], rows)
        total = total + ops.cast(part, "float32")
    return ops.cast(total, dtype)


def embed(ids: Any, packed: Any, dtype: str) -> Any:
    """Looks up rows `ids [...]` of a packed embedding `[V, D]` -> `[..., D]`."""
    if isinstance(packed, Quantized):
        return _module.quantized_layout().embed(ids, packed, dtype)
    return _module.embed(ids, packed)


def to_tensor(array: Any) -> Any:
    """Converts an array to a tensor of the same dtype. A tensor is returned as it is.

    By default, Keras converts integers to `keras.config.floatx()` if that is bfloat16, on JAX.
    Numbers of 64 bits become numbers of 32, which JAX computes with.
    """
    dtype = keras.backend.standardize_dtype(array.dtype)
    return ops.convert_to_tensor(array, dtype.replace("64", "32"))


def assign(variable: keras.Variable, packed: np.ndarray) -> None:
    """Assigns a packed weight of the variable's dtype. `packed` must not be modified afterwards."""
    keras_internals.assign(variable, _module.from_numpy(packed))

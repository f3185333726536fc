"""Quantized numbers of ggml types in the plain form of `backend.Quantized`, without rounding.

https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h describes the blocks. Knows bytes.
Knows nothing about files and models.
"""

import numpy as np

from keras_gemma.backend import Quantized


def plain_form(data: np.ndarray, type: str, block_bytes: int) -> Quantized:
    """Returns the plain form of rows of blocks, in the layout `STORED_TYPES[type]`.

    Args:
        data: uint8 `[rows, bytes]`.
        type: Name of a ggml type in `quantization.STORED_TYPES`.
        block_bytes: Bytes of a block.
    """
    rows = len(data)
    parts = _TYPES[type](data.reshape(rows, -1, block_bytes))
    return parts.map(lambda array: np.ascontiguousarray(array.reshape(rows, -1)))


def _split(blocks: np.ndarray, *sizes: int) -> list[np.ndarray]:
    """Splits blocks `[..., bytes]` into parts of these sizes, and the rest."""
    return np.split(blocks, np.cumsum(sizes), axis=-1)


def _float16(data: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(data).view("<f2")


def _nibbles(data: np.ndarray) -> np.ndarray:
    """Returns low and high half bytes of `[..., n]` -> int8 `[..., 2, n]`."""
    return np.stack([data & 15, data >> 4], axis=-2).view("int8")


def _q4_0(blocks: np.ndarray) -> Quantized:
    scales, pairs = _split(blocks, 2)
    return Quantized(_nibbles(pairs) - np.int8(8), _float16(scales))


def _q4_1(blocks: np.ndarray) -> Quantized:
    scales, minimums, pairs = _split(blocks, 2, 2)
    return Quantized(_nibbles(pairs), _float16(scales), minimums=_float16(minimums))


def _q5_0(blocks: np.ndarray) -> Quantized:
    scales, bits, pairs = _split(blocks, 2, 4)
    fifth = np.unpackbits(bits, axis=-1, bitorder="little").view("int8")
    values = _nibbles(pairs).reshape(fifth.shape) | fifth << 4
    return Quantized(values - np.int8(16), _float16(scales))


def _q8_0(blocks: np.ndarray) -> Quantized:
    scales, values = _split(blocks, 2)
    return Quantized(np.ascontiguousarray(values).view("int8"), _float16(scales))


def _scales_of_k(
    scales: np.ndarray, minimums: np.ndarray, packed: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns float32 scales and minimums `[..., 8]`: a float16 times the 6 bits of each."""
    low, low_of_minimums, rest = _split(packed, 4, 4)
    six_bits = np.concatenate([low & 63, rest & 15 | low >> 2 & 48], axis=-1)
    six_bits_of_minimums = np.concatenate(
        [low_of_minimums & 63, rest >> 4 | low_of_minimums >> 2 & 48], axis=-1
    )
    return (
        _float16(scales).astype("float32") * six_bits,
        -(_float16(minimums).astype("float32") * six_bits_of_minimums),
    )


def _q4_k(blocks: np.ndarray) -> Quantized:
    *scales, pairs = _split(blocks, 2, 2, 12)
    scales, minimums = _scales_of_k(*scales)
    values = _nibbles(pairs.reshape(*pairs.shape[:-1], 4, 32))
    return Quantized(values, scales, minimums=minimums)


def _q5_k(blocks: np.ndarray) -> Quantized:
    *scales, bits, pairs = _split(blocks, 2, 2, 12, 32)
    scales, minimums = _scales_of_k(*scales)
    values = _nibbles(pairs.reshape(*pairs.shape[:-1], 4, 32)).reshape(*pairs.shape[:-1], 8, 32)
    fifth = bits[..., None, :] >> np.arange(8, dtype="uint8")[:, None] & 1
    return Quantized(values | (fifth << 4).view("int8"), scales, minimums=minimums)


def _q6_k(blocks: np.ndarray) -> Quantized:
    pairs, bits, eight_bits, scales = _split(blocks, 128, 64, 16)
    low = _nibbles(pairs.reshape(*pairs.shape[:-1], 2, 64))
    bits = bits.reshape(*bits.shape[:-1], 2, 1, 32)
    high = bits >> np.arange(0, 8, 2, dtype="uint8")[:, None] & 3
    values = low.reshape(high.shape) | (high << 4).view("int8")
    scales = _float16(scales).astype("float32") * np.ascontiguousarray(eight_bits).view("int8")
    return Quantized(values - np.int8(32), scales)


_TYPES = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}

"""Counter-based random numbers: equal on JAX, TensorFlow and PyTorch, and for any batch size.

Threefry-2x32 with 20 rounds (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3")
makes a key for each row and step, and a hash of this key and a token id makes the number of each
token, at a tenth of the cost. Uses int32 with wrap-around, because some backends lack unsigned
integers.
"""

from typing import Any

import numpy as np
from keras import ops

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA

TOKEN_FACTOR = 0x9E3779B1 - (1 << 32)
"""Odd constant near 2**32 divided by the golden ratio, which spreads consecutive token ids."""

MIXING = ((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32)))
"""Shifts and factors of lowbias32."""

HASH_FACTOR = 2654435761
"""Knuth's multiplicative constant: odd, so no change of a single token keeps the hash."""


def hash_ids(ids: np.ndarray) -> int:
    """Returns a hash of int32 ids `[n]`, in `[0, 2**32)`: a polynomial with 32-bit wrap-around.

    Adding 1 makes an id of 0 count, and padding of -1 not: an exported graph sums padded rows.
    """
    factors = np.cumprod(np.full(len(ids), HASH_FACTOR), dtype="uint32")
    return int(np.sum((ids + 1).astype("uint32") * factors, dtype="uint32"))


def _rotate_left(x: Any, bits: Any) -> Any:
    low = ops.right_shift(x, 32 - bits) & (ops.left_shift(ops.ones_like(bits), bits) - 1)
    return ops.left_shift(x, bits) | low


def threefry(key: tuple[Any, Any], counter: tuple[Any, Any]) -> tuple[Any, Any]:
    """Returns two words of random bits for a key and a counter of two words each.

    All words are int32, have the bits of Threefry's unsigned words, and broadcast together. The
    five groups of rounds are a loop, because XLA takes minutes to compile them unrolled.
    """
    keys = ops.stack([*key, key[0] ^ key[1] ^ PARITY])
    rotations = ops.convert_to_tensor(ROTATIONS, dtype="int32")
    zeros = ops.zeros_like(counter[0] + counter[1] + key[0])

    def rounds(group: Any, words: tuple[Any, Any]) -> tuple[Any, Any]:
        x0, x1 = words
        for i in range(4):
            x0 = x0 + x1
            x1 = _rotate_left(x1, rotations[group % 2, i]) ^ x0
        x0 = x0 + keys[(group + 1) % 3]
        x1 = x1 + keys[(group + 2) % 3] + (group + 1)
        return x0, x1

    return ops.fori_loop(0, 5, rounds, (zeros + counter[0] + key[0], zeros + counter[1] + key[1]))


def _mix(x: Any) -> Any:
    """Returns the hash "lowbias32" of int32 words (Wellons, 2018, "Prospecting for hash
    functions"), a bijection whose output bits all depend on all input bits."""
    for bits, factor in MIXING:
        x = (x ^ _shift_right(x, bits)) * factor
    return x ^ _shift_right(x, 16)


def _shift_right(x: Any, bits: int) -> Any:
    """Shifts int32 words as if they were unsigned."""
    return ops.right_shift(x, bits) & ((1 << (32 - bits)) - 1)


def token_bits(key: tuple[Any, Any], tokens: Any) -> Any:
    """Returns random bits for each of `tokens`, int32 `[1 or B, n]` -> int32 `[B, n]`.

    `key` are two words for each row, int32 `[B, 1]` each. The second one enters between two
    hashes, so that the numbers of two keys are not those of one sequence at two offsets.
    """
    return _mix(_mix(tokens * TOKEN_FACTOR + key[0]) + key[1])


def gumbel(seed: Any, rows: Any, step: Any, tokens: Any) -> Any:
    """Returns Gumbel noise for each of `tokens`, int32 `[1 or B, n]` -> float32 `[B, n]`.

    With the noise of all tokens, `argmax(logits + noise)` samples from `softmax(logits)`. `rows`
    distinguish rows with the same seed (`Request.row_keys`), and `step` is the number of tokens
    chosen before; all three are int32 `[B]`.
    """
    first, second = threefry((seed, rows), (step, ops.zeros_like(step)))
    bits = token_bits((first[:, None], second[:, None]), tokens)
    bits = _shift_right(bits, 8)
    # In (0, 1), without the limits. The largest value needs 25 bits, one more than float32 has,
    # and would round to 1, whose noise is infinite.
    uniform = ops.minimum((ops.cast(bits, "float32") + 0.5) * 2.0**-24, 1 - 2.0**-24)
    return -ops.log(-ops.log(uniform))

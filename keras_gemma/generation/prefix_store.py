"""Keys and values of prompts that were read before, shared by the requests of the engine.

A prompt is divided into blocks of the size of a prefill chunk. The key of a block is a hash of its
tokens and of the key before it, so equal keys mean equal beginnings. Prefill after a hit has the
same chunks as without one, and therefore the same results, bit for bit.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator

import keras
import numpy as np
from keras import ops

from keras_gemma.config import BYTES_PER_ELEMENT
from keras_gemma.model.cache import Cache


class PrefixStore:
    """Blocks of keys and values by their tokens. The least recently used are dropped.

    Args:
        block_tokens: Tokens per block.
        max_bytes: Maximum number of bytes of all blocks. 0 disables the store.
    """

    def __init__(self, block_tokens: int, max_bytes: int) -> None:
        self.block_tokens, self.max_bytes = block_tokens, max_bytes
        self.num_bytes = 0
        self._blocks: OrderedDict[bytes, Cache] = OrderedDict()  # most recently used last

    def lookup(self, ids: np.ndarray, salt: str) -> tuple[int, Cache | None]:
        """Returns the number of tokens at the beginning of `ids`, int32 `[n]`, that are stored, and
        their keys and values `[1, S, K, H]`.

        At least one token is left to read.
        """
        keys = []
        for key in self._keys(ids[:-1], salt):
            if key not in self._blocks:
                break
            keys.append(key)
        self._touch(keys)
        if not keys:
            return 0, None
        layers = zip(*(self._blocks[key] for key in keys), strict=True)
        cache = [
            tuple(ops.concatenate(arrays, axis=1) for arrays in zip(*pairs, strict=True))
            for pairs in layers
        ]
        return len(keys) * self.block_tokens, cache

    def store(self, ids: np.ndarray, salt: str, cache: Cache) -> None:
        """Stores the whole blocks of a prompt that was read into `cache`, by position."""
        size = self.block_tokens * _bytes_per_token(cache)
        keys = list(self._keys(ids, salt))[: self.max_bytes // size]
        for i, key in enumerate(keys):
            if key in self._blocks:
                continue
            start = i * self.block_tokens
            self._blocks[key] = [
                tuple(ops.copy(array[:, start : start + self.block_tokens]) for array in pair)
                for pair in cache
            ]
            self.num_bytes += size
        self._touch(keys)
        while self.num_bytes > self.max_bytes:
            self._blocks.popitem(last=False)
            self.num_bytes -= size

    def clear(self) -> None:
        """Drops all blocks."""
        self._blocks.clear()
        self.num_bytes = 0

    def _touch(self, keys: list[bytes]) -> None:
        """Marks blocks as used, the first one last: no block is of use without those before it."""
        for key in reversed(keys):
            self._blocks.move_to_end(key)

    def _keys(self, ids: np.ndarray, salt: str) -> Iterator[bytes]:
        key = hashlib.sha256(salt.encode()).digest()
        for start in range(0, len(ids) - self.block_tokens + 1, self.block_tokens):
            block = np.ascontiguousarray(ids[start : start + self.block_tokens], "int32")
            key = hashlib.sha256(key + block.tobytes()).digest()
            yield key


def _bytes_per_token(cache: Cache) -> int:
    keys = cache[0][0]
    size = BYTES_PER_ELEMENT[keras.backend.standardize_dtype(keys.dtype)]
    return 2 * len(cache) * int(np.prod(keys.shape[2:])) * size

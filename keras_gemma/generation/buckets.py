"""Sizes of prompt chunks and caches, rounded up to powers of two.

Lengths in the same bucket share a compiled program.
"""

from keras_gemma.buckets import MIN_BUCKET, bucket

MIN_CACHE_SLOTS = 256
"""Minimum number of cache slots. They cost little memory, and short texts never grow their
cache."""

MAX_CHUNK_TOKENS = 512
"""Maximum number of tokens in a prompt chunk, over all rows."""


def chunks(start: int, end: int, batch: int) -> list[tuple[int, int]]:
    """Splits the positions from `start` to `end` into chunks, as pairs of start and size.

    The sizes are buckets, so the last chunk may exceed `end`.
    """
    largest = max(MIN_BUCKET, bucket(MAX_CHUNK_TOKENS // batch + 1) // 2)
    pairs = []
    while start < end:
        pairs.append((start, min(largest, bucket(end - start))))
        start += pairs[-1][1]
    return pairs

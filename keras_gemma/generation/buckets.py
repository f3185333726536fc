"""Sizes of prompt chunks and caches, rounded up to powers of two.

Lengths in the same bucket share a compiled program.
"""

MIN_BUCKET_TOKENS = 16
"""Minimum size of a prompt chunk, in tokens."""

MIN_CACHE_SLOTS = 256
"""Minimum number of cache slots. They cost little memory, and short texts never grow their
cache."""

MAX_CHUNK_TOKENS = 512
"""Maximum number of tokens in a prompt chunk, over all rows."""


def bucket(length: int, minimum: int = MIN_BUCKET_TOKENS) -> int:
    """Returns `length` rounded up to a power of two, at least `minimum`."""
    return max(minimum, 1 << (length - 1).bit_length())


def chunks(start: int, end: int, batch: int) -> list[tuple[int, int]]:
    """Splits the positions from `start` to `end` into chunks, as pairs of start and size.

    The sizes are buckets, so the last chunk may exceed `end`.
    """
    largest = max(MIN_BUCKET_TOKENS, bucket(MAX_CHUNK_TOKENS // batch + 1) // 2)
    pairs = []
    while start < end:
        pairs.append((start, min(largest, bucket(end - start))))
        start += pairs[-1][1]
    return pairs

"""Sizes that programs are compiled for: rounded up to powers of two.

A prompt one token longer then compiles nothing.
"""

SMALLEST_BUCKET = 16
"""Of a prompt."""

SMALLEST_CACHE = 256
"""Slots that cost next to nothing, and spare short texts the growing."""

LARGEST_CHUNK = 512
"""Tokens of a prompt that are read at once, of all rows together."""


def bucket(length: int, smallest: int = SMALLEST_BUCKET) -> int:
    """`length` rounded up to a power of two, `smallest` at least."""
    return max(smallest, 1 << (length - 1).bit_length())


def chunks(start: int, end: int, batch: int) -> list[tuple[int, int]]:
    """Where to cut the tokens from `start` to `end`: beginnings, and sizes that are buckets."""
    largest = max(SMALLEST_BUCKET, bucket(LARGEST_CHUNK // batch + 1) // 2)
    cuts = []
    while start < end:
        cuts.append((start, min(largest, bucket(end - start))))
        start += cuts[-1][1]
    return cuts

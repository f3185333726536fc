"""Sizes that programs are compiled for: rounded up to powers of two.

A prompt one token longer then compiles nothing.
"""

from keras_gemma.buckets import MIN_BUCKET, bucket

SMALLEST_CACHE = 256
"""Slots that cost next to nothing, and spare short texts the growing."""

LARGEST_CHUNK = 512
"""Tokens of a prompt that are read at once, of all rows together."""


def chunks(start: int, end: int, batch: int) -> list[tuple[int, int]]:
    """Where to cut the tokens from `start` to `end`: beginnings, and sizes that are buckets."""
    largest = max(MIN_BUCKET, bucket(LARGEST_CHUNK // batch + 1) // 2)
    cuts = []
    while start < end:
        cuts.append((start, min(largest, bucket(end - start))))
        start += cuts[-1][1]
    return cuts

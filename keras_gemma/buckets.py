"""Sizes rounded up to a few buckets, because every new size compiles a program."""

MIN_BUCKET = 16
"""Smallest bucket, in tokens."""


def bucket(length: int, minimum: int = MIN_BUCKET, max_step: int | None = None) -> int:
    """Returns `length` rounded up to a power of two.

    Args:
        length: Length, in tokens.
        minimum: Smallest bucket.
        max_step: If set, rounds up to a multiple of this number if that is smaller.
    """
    size = 1 << (length - 1).bit_length()
    if max_step is not None:
        size = min(size, -(-length // max_step) * max_step)
    return max(minimum, size)

"""Sizes of weights, and how the weights are divided among files.

Knows neither a format nor the names in it.
"""

import math
import re
import sys

from keras_gemma.checks import is_number

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(size: int | float | str) -> int:
    """Returns the bytes in `"10GB"`, `"512MiB"` or a number of bytes."""
    number, unit = size, "B"
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+|\d*\.\d+)\s*([KMGT]?i?B)\s*", size, re.IGNORECASE)
        number, unit = (float(match[1]), match[2].upper()) if match else (None, "B")
    if not is_number(number) or unit not in _UNITS or not 1 <= number * _UNITS[unit] < math.inf:
        raise ValueError(
            "`max_shard_size` must be a number of bytes, or a string such as '10GB' or '1.5TiB'. "
            f"Received: max_shard_size={size!r}"
        )
    return int(number * _UNITS[unit])


def parse_gigabytes(size: float | str | None) -> int:
    """Returns the bytes of KerasHub's `max_shard_size`: a number of GiB. `None` sets no limit.

    Strings are those of `parse_size`.
    """
    if size is None:
        return sys.maxsize
    return parse_size(size * 2**30 if is_number(size) else size)


def plan_shards(sizes: dict[str, int], max_shard_size: int) -> list[list[str]]:
    """Divides weights, given by their bytes, among files. Returns the names in each file."""
    name, largest = max(sizes.items(), key=lambda item: item[1])
    if largest > max_shard_size:
        raise ValueError(
            f"`max_shard_size` is smaller than the largest tensor ({name}: {largest} bytes). "
            f"Received: {max_shard_size} bytes"
        )
    plan: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if filled + size > max_shard_size:
            plan.append([])
            filled = 0
        plan[-1].append(name)
        filled += size
    return plan

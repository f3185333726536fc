"""How large weights are, and how they are divided among files.

Knows neither a format nor the names in it.
"""

import math
import re
from typing import Any

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


def parse_size(size: int | float | str) -> int:
    """Bytes in `"10GB"`, `"512MiB"` or a number of bytes.

    Raises:
        ValueError: not a size, or not positive.
    """
    if isinstance(size, (int, float)) and not isinstance(size, bool) and size > 0:
        return int(size)
    match = re.fullmatch(r"\s*([\d.]+)\s*([KMG]?i?B)\s*", str(size), re.IGNORECASE)
    if match is None or not float(match[1]) > 0:
        raise ValueError(
            "`max_shard_size` must be a number of bytes, or a string such as '10GB'. "
            f"Received: max_shard_size={size!r}"
        )
    return int(float(match[1]) * _UNITS[match[2].upper()])


def plan_shards(sizes: dict[str, int], max_shard_size: int) -> list[list[str]]:
    """Which weights go into which file, in their order: one list a file.

    Args:
        sizes: bytes of each weight.
        max_shard_size: bytes that a file may hold.

    Raises:
        ValueError: one weight alone is larger than a file may be.
    """
    name, largest = max(sizes.items(), key=lambda item: item[1])
    if largest > max_shard_size:
        raise ValueError(
            f"`max_shard_size` is smaller than the largest tensor ({name}: {largest} bytes). "
            f"Received: {max_shard_size} bytes. A number counts bytes; '10GB' is a string."
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


def weight_size(weight: Any) -> int:
    """Bytes of a weight (`shape`, `dtype`) in its own dtype."""
    return math.prod(weight.shape) * _ELEMENT_BYTES[str(weight.dtype)]


def weight_sizes(backbone: Any) -> dict[str, int]:
    """Bytes of each weight of `backbone`."""
    return {name: weight_size(weight) for name, weight in backbone.named_weights().items()}

"""Host machine: free memory, and the folder of its compiled programs."""

import hashlib
import os
import platform
from pathlib import Path

from keras_gemma.hub_caches import own_cache

MEMINFO = Path("/proc/meminfo")
GROUP = Path("/proc/self/cgroup")
"""Control groups of this process, one per line: `number:controllers:/path` (cgroups(7))."""
GROUPS = Path("/sys/fs/cgroup")


def free_memory() -> int | None:
    """Returns the free memory in bytes, or `None` if unknown (on systems other than Linux).

    A container's limit counts if it leaves less than the machine has available.
    """
    limits = _left_to_groups()
    available = _field(MEMINFO, "MemAvailable:")
    if available is not None:
        limits.append(available * 1024)
    return max(0, min(limits)) if limits else None


def _left_to_groups() -> list[int]:
    """Returns the bytes left to each control group of this process that has a limit.

    The parents of a group also limit it. In a container the path may be the host's path, and the
    root may be the container's own group.
    """
    left = []
    for line in _lines(GROUP):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, most, now, cache = GROUPS, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, most = GROUPS / "memory", "memory.limit_in_bytes"
            now, cache = "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        group = Path(path.strip("/"))
        for folder in {root / group, *(root / parent for parent in group.parents)}:
            limit, used = _number(folder / most), _number(folder / now)
            if limit is not None and used is not None:
                left.append(limit - used + (_field(folder / "memory.stat", cache) or 0))
    return left


def _number(file: Path) -> int | None:
    """Returns the number in a file; `None` if the file is missing or says `max` (no limit)."""
    text = "".join(_lines(file)).strip()
    return int(text) if text.isdecimal() else None


def _field(file: Path, name: str) -> int | None:
    """Returns the number after `name` in a file, or `None` if the name is missing."""
    return next((int(line.split()[1]) for line in _lines(file) if line.split()[0] == name), None)


def program_cache(framework: str) -> Path:
    """Returns the folder of compiled programs for this processor type, in the user's cache."""
    cpuinfo = _lines(Path("/proc/cpuinfo"))
    features = next((line for line in cpuinfo if line.startswith("flags")), "")
    processor = hashlib.sha256((platform.machine() + features).encode()).hexdigest()[:12]
    return own_cache() / framework / processor


def _lines(file: Path) -> list[str]:
    """Returns the lines of a file, or an empty list if the file cannot be read."""
    return file.read_text().splitlines() if os.access(file, os.R_OK) and file.is_file() else []

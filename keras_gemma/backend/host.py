"""The machine: its free memory, and where programs that were compiled for it are kept."""

import hashlib
import os
import platform
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
GROUP = Path("/proc/self/cgroup")
"""The control groups of this process, a line each: `number:controllers:/path` (cgroups(7))."""
GROUPS = Path("/sys/fs/cgroup")


def free_memory() -> int | None:
    """Bytes that programs can still have, or None where the system does not say (Linux does).

    What the machine has available, or what a container may still take, if that is less.
    """
    known = [free for free in (_available(), *_left_to_groups()) if free is not None]
    return max(0, min(known)) if known else None


def _available() -> int | None:
    for line in _lines(MEMINFO):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _left_to_groups() -> list[int]:
    """Bytes left to each control group that this process is in and that has a limit.

    A group's parents limit it too. In a container the path may be that of the host, and its own
    group stand at the root.
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
                left.append(limit - used + _field(folder / "memory.stat", cache))
    return left


def _number(file: Path) -> int | None:
    """The number in a file; None where there is no file, or it says `max`: no limit."""
    text = "".join(_lines(file)).strip()
    return int(text) if text.isdecimal() else None


def _field(file: Path, name: str) -> int:
    """What `name` counts in a file of names and numbers; 0 where it is not there."""
    return next((int(line.split()[1]) for line in _lines(file) if line.split()[0] == name), 0)


def program_cache(framework: str) -> Path:
    """A folder for compiled programs, of this kind of processor alone.

    `$XDG_CACHE_HOME/keras_gemma`, by default in `~/.cache`.
    """
    cpuinfo = _lines(Path("/proc/cpuinfo"))
    features = next((line for line in cpuinfo if line.startswith("flags")), "")
    processor = hashlib.sha256((platform.machine() + features).encode()).hexdigest()[:12]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "keras_gemma" / framework / processor


def _lines(file: Path) -> list[str]:
    """The lines of a file of Linux's; none where there is no such file, or it may not be read."""
    return file.read_text().splitlines() if os.access(file, os.R_OK) and file.is_file() else []

"""The machine: its free memory, and where programs that were compiled for it are kept."""

import hashlib
import os
import platform
from pathlib import Path


def free_memory() -> int | None:
    """Bytes that programs can still have, or None where the system does not say (Linux does)."""
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def program_cache(framework: str) -> Path:
    """A folder for compiled programs, of this kind of processor alone.

    `$XDG_CACHE_HOME/keras_gemma`, by default in `~/.cache`.
    """
    features = next((line for line in _lines("/proc/cpuinfo") if line.startswith("flags")), "")
    processor = hashlib.sha256((platform.machine() + features).encode()).hexdigest()[:12]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "keras_gemma" / framework / processor


def _lines(file: str) -> list[str]:
    """The lines of a file of Linux's; none on other systems."""
    return Path(file).read_text().splitlines() if Path(file).is_file() else []

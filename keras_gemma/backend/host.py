"""The machine's own memory."""

from pathlib import Path


def free_memory() -> int | None:
    """Bytes that programs can still have, or None where the system does not say (Linux does)."""
    table = Path("/proc/meminfo")
    if not table.is_file():
        return None
    for line in table.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None

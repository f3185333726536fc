"""Current and peak host memory of this process.

Read from `/proc/self` on Linux. `None` on other systems, or if the peak cannot be reset. Knows
nothing about device memory.
"""

import os
from pathlib import Path

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")
RESET_PEAK = "5"
"""Value that resets the peak, written to `clear_refs` (proc(5))."""


def resident() -> int | None:
    """Returns the bytes of this process that are in memory."""
    return _field("VmRSS") if STATUS.exists() else None


def peak() -> int | None:
    """Returns the peak of `resident` since `reset_peak`."""
    return _field("VmHWM") if _can_reset() else None


def reset_peak() -> None:
    """Resets the peak to the current memory."""
    if _can_reset():
        RESET.write_text(RESET_PEAK)


def _can_reset() -> bool:
    return STATUS.exists() and os.access(RESET, os.W_OK)


def _field(name: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{STATUS} has no line {name!r}, so this kernel does not report it.")

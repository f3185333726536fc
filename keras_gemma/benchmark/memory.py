"""What this process holds in the host's memory, and held at most.

Known on Linux, from `/proc/self`; elsewhere, and where the peak may not be reset, the answer is
None. Knows nothing of an accelerator's memory.
"""

import os
from pathlib import Path

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")
RESET_PEAK = "5"
"""What `clear_refs` takes to begin a new peak (proc(5))."""


def resident() -> int | None:
    """Bytes of this process in memory now."""
    return _field("VmRSS") if STATUS.exists() else None


def peak() -> int | None:
    """Bytes of this process in memory at most since `forget_peak`."""
    return _field("VmHWM") if _can_reset() else None


def forget_peak() -> None:
    """Begin a new peak, at what is in memory now."""
    if _can_reset():
        RESET.write_text(RESET_PEAK)


def _can_reset() -> bool:
    return STATUS.exists() and os.access(RESET, os.W_OK)


def _field(name: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{STATUS} has no line {name!r}: this kernel does not tell.")

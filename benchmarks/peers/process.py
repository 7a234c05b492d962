"""What a worker asks the system about its own process. Standard library only."""

import ctypes
import os
import re
from pathlib import Path

_STATUS = Path("/proc/self/status")


def cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def resident() -> int | None:
    """Returns the bytes of memory that this process has now; None where Linux does not say."""
    return _field("VmRSS")


def peak() -> int | None:
    """Returns the most bytes that this process has had since `reset_peak`; None as above."""
    return _field("VmHWM")


def reset_peak() -> None:
    """Starts the peak anew at what the process has now, freed memory given back first."""
    if _STATUS.exists():
        give_back()
        Path("/proc/self/clear_refs").write_text("5")


def give_back(above: int = 0) -> None:
    """Gives freed memory back to the system, if the process has more than `above` bytes."""
    used = resident()
    if used is not None and used > above:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
        if trim is not None:
            trim(0)


def _field(name: str) -> int | None:
    if not _STATUS.exists():
        return None
    found = re.search(rf"^{name}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    return 1024 * int(found[1]) if found else None

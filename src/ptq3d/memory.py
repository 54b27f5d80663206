"""What this process holds of the machine's memory."""

from __future__ import annotations

import sys
from pathlib import Path

STATUS = Path("/proc/self/status")
MACHINE = Path("/proc/meminfo")
CONTAINER = Path("/sys/fs/cgroup")


def peak_memory_bytes() -> int:
    """The most memory this process ever held.

    Linux hands `ru_maxrss` on from parent to child, so there the high-water mark of /proc is read instead.
    """
    if STATUS.exists():
        return _status("VmHWM")
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_bytes() -> int:
    """The memory this process holds now; where the system does not say, the most it ever held."""
    return _status("VmRSS") if STATUS.exists() else peak_memory_bytes()


def available_bytes() -> int:
    """The memory that the machine, or the container's limit, could give to new work; where nothing says, half of what there is."""
    if MACHINE.exists():
        lines = MACHINE.read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
        return min(free, _left_in_container(free))
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _left_in_container(otherwise: int) -> int:
    """What the limit of the control group leaves, `otherwise` where there is none."""
    try:
        limit, used = (
            (CONTAINER / name).read_text(encoding="ascii").strip() for name in ("memory.max", "memory.current")
        )
    except OSError:
        return otherwise
    return otherwise if limit == "max" else max(0, int(limit) - int(used))


def _status(key: str) -> int:
    lines = STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024

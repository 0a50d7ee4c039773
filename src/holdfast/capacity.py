"""How much memory a device has, or as much of it as a container may hold."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import torch

CGROUP = Path("/sys/fs/cgroup")
"""Where Linux tells a container what it may hold."""


def total_bytes(device: torch.device | str) -> float:
    """All memory of one device, whoever holds it. A device that does not say is taken to be as
    large as this machine, whose memory it mostly shares."""
    device = torch.device(device)
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return machine_bytes()


def machine_bytes() -> float:
    """Bytes of memory here, or as many as a container may hold."""
    whole = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    limit = number(CGROUP / "memory.max")
    return whole if limit is None else min(whole, limit)


def available_bytes() -> float:
    """Bytes that can be had without swapping: of this machine, and of this container's limit."""
    free = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))
    said = _table(Path("/proc/meminfo"), ":").get("MemAvailable")
    free = free if said is None else 1024.0 * said
    limit, used = number(CGROUP / "memory.max"), number(CGROUP / "memory.current")
    if limit is not None and used is not None:
        # Files that were read count as used, and are let go of first.
        cached = _table(CGROUP / "memory.stat", " ").get("inactive_file", 0)
        free = min(free, max(0.0, limit - used + cached))
    return free


def peak_resident_bytes() -> int:
    """The most that this process has held in memory so far, interpreter and libraries included."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def number(file: Path) -> float | None:
    """What a file says if that is a number: `max` stands for no limit."""
    try:
        return float(file.read_text())
    except (OSError, ValueError):
        return None


def _table(file: Path, separator: str) -> dict[str, int]:
    """Name → number, of lines `name separator number …`; nothing where there is no such file."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.partition(separator) for line in lines)
    return {name: int(rest.split()[0]) for name, _, rest in pairs if rest.split()[:1]}

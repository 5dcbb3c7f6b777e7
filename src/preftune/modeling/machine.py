"""How much memory a process may use here, and how much it uses: the machine, its container, the GPU."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

CGROUP = Path("/sys/fs/cgroup")
PROC = Path("/proc")
_KIB = 1024


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """Bytes that one process may come to use, and what sets the limit, in words."""

    num_bytes: int
    what: str


def memory_limit(device: torch.device) -> MemoryLimit | None:
    """The least of what the machine has free and what the container allows; of a GPU, its free memory. None: unknown.

    What this process itself holds counts as free, because the trainer takes its place.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return MemoryLimit(int(free) + int(torch.cuda.memory_reserved(device)), "free memory of the GPU")
    own = resident_bytes()
    limits = []
    available = _meminfo("MemAvailable")
    if available is not None:
        limits.append(MemoryLimit(available + own, "free memory of the machine"))
    held = cgroup_memory()
    if held is not None:
        limit, used = held
        limits.append(MemoryLimit(limit - used + own, "memory limit of the container"))
    return min(limits, key=lambda one: one.num_bytes, default=None)


def device_bytes(device: torch.device) -> int | None:
    """Memory of a GPU; None for a CPU, whose memory all processes share."""
    return int(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else None


def total_memory() -> int | None:
    """Bytes of memory that the machine has."""
    return _meminfo("MemTotal")


def cgroup_memory(root: Path = CGROUP) -> tuple[int, int] | None:
    """The container's limit and what it uses without what can be dropped (file cache); None where there is no limit."""
    for limit_file, used_file, stat_key in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit, used = _number(root / limit_file), _number(root / used_file)
        if limit is None or used is None or limit >= 1 << 60:
            continue
        stat = (root / used_file).with_name("memory.stat")
        cached = next((int(line.split()[1]) for line in _lines(stat) if line.startswith(f"{stat_key} ")), 0)
        return limit, max(0, used - cached)
    return None


def resident_bytes() -> int:
    """Memory of this process that is resident now; 0 where it is not known."""
    return _status("VmRSS")


def peak_resident_bytes() -> int:
    """The most memory of this process that was resident at one time; 0 where it is not known.

    Of this very process: what ``getrusage`` gives may be that of the process which started it.
    """
    return _status("VmHWM")


def limit_memory(num_bytes: int) -> None:
    """Make allocations beyond this fail in this process, and let the kernel end it first where memory runs out."""
    import resource

    base = _status("VmData")
    resource.setrlimit(resource.RLIMIT_DATA, (base + num_bytes, resource.RLIM_INFINITY))
    try:
        (PROC / "self" / "oom_score_adj").write_text("1000", encoding="ascii")
    except OSError:
        return


def cpu_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _meminfo(name: str) -> int | None:
    return next((int(line.split()[1]) * _KIB for line in _lines(PROC / "meminfo") if line.startswith(f"{name}:")), None)


def _status(name: str) -> int:
    lines = _lines(PROC / "self" / "status")
    return next((int(line.split()[1]) * _KIB for line in lines if line.startswith(f"{name}:")), 0)


def _number(path: Path) -> int | None:
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []

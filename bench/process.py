"""Facts of this process that both runners report; standard library only, for it runs in either environment."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path


def peak_rss_bytes() -> int:
    """Highest resident set of this process image (VmHWM): `ru_maxrss` would inherit the parent's across exec."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def differences(times: Sequence[float]) -> list[float]:
    """Seconds between one time and the next."""
    return [after - before for before, after in pairwise(times)]

"""Who is using a folder: a process says so in a small file, and what died without a word is not believed."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from preftune.core.files import write_json

HOLDERS = ".held-by"


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that uses a folder: its number, the host, and when it started (in the kernel's ticks, 0: unknown)."""

    pid: int
    host: str
    started: int

    @property
    def is_alive(self) -> bool:
        """Whether that very process still runs; one on another host is believed."""
        if self.host != socket.gethostname():
            return True
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return self.started in {0, _started(self.pid)}


@contextmanager
def hold(*folders: Path) -> Iterator[None]:
    """Mark folders as in use by this process while the block runs; ``gc`` leaves them alone."""
    me = Holder(os.getpid(), socket.gethostname(), _started(os.getpid()))
    files = [folder / HOLDERS / f"{me.host}-{me.pid}.json" for folder in folders]
    created = [file for file in files if not file.exists()]  # an outer block of the same process keeps its own
    for file in created:
        write_json(file, {"pid": me.pid, "host": me.host, "started": me.started})
    try:
        yield
    finally:
        for file in created:
            file.unlink(missing_ok=True)
            with suppress(OSError):  # another process may hold it too
                file.parent.rmdir()


def holders(folder: Path) -> list[Holder]:
    """The processes that use a folder now."""
    found: list[Holder] = []
    for file in sorted((folder / HOLDERS).glob("*.json")):
        try:
            said = json.loads(file.read_text(encoding="utf-8"))
            holder = Holder(int(said["pid"]), str(said["host"]), int(said["started"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if holder.is_alive:
            found.append(holder)
    return found


def _started(pid: int) -> int:
    """When a process started, in clock ticks since the machine did; 0 where it is not known."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[19])

"""How a process of ours ends: in the ordinary way, or at once where something that it started would keep it."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

_held: list[str] = []


def leave_behind(what: str) -> None:
    """Note that something would keep this process from ending (a thread, an exit handler of a package that waits), and is not to.

    Only ``end`` heeds it: a process that is not ours, such as a notebook, ends as it likes.
    """
    _held.append(what)


def end(code: int) -> NoReturn:
    """End this process with an exit code; without waiting for threads and exit handlers where something was left behind."""
    if not _held:
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)

"""Replies of a judge by the content of the request: append-only, so that a killed process pays for nothing twice."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class ReplyCache:
    """Replies by digest of the request, in one JSON Lines file, or in memory only.

    Each reply is one write to the end of the file as soon as it is there. A process that opens the file closes a line
    that a crash cut, and readers pass over it, so several processes may share a file.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._held: dict[str, dict[str, Any]] = {}
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            file.seek(0)
            lines = file.read().split(b"\n")
            if lines[-1]:
                file.write(b"\n")
        for line in lines:
            try:
                row = json.loads(line)
                self._held[row["key"]] = row["reply"]
            except (ValueError, KeyError, TypeError):
                continue  # an empty line, or one that a crash cut

    def get(self, key: str) -> dict[str, Any] | None:
        """The reply to a request, or None."""
        return self._held.get(key)

    def put(self, key: str, reply: Mapping[str, Any]) -> None:
        """Keep a reply; it is on its way to the disk when this returns."""
        row = json.dumps({"key": key, "reply": reply}, ensure_ascii=True).encode() + b"\n"
        with self._lock:
            self._held[key] = dict(reply)
            if self._path is not None:
                with self._path.open("ab", buffering=0) as file:
                    file.write(row)

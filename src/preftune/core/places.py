"""Messages for people elsewhere: places of this machine are its operator's, so only the last name of a path is told."""

from __future__ import annotations

import os
import re
from pathlib import Path

_FOLDERS = re.compile(r"(?<![\w.:/~-])(/[^\s'\"/]+)/(?:[^\s'\"/]+/)*")
_OWN = ("PREFTUNE_HOME", "PREFTUNE_CACHE", "HOME")  # of these the whole is known, so that a blank in it hides nothing


def without_places(text: str) -> str:
    """The same words, and of each path of this machine its last name alone. What begins with no folder of it, such as a route,
    stays.

    >>> without_places("first /usr/lib/a/b.json:3; POST /v1/files; https://a.example/usr/lib/x; 'at /usr/lib'")
    "first b.json:3; POST /v1/files; https://a.example/usr/lib/x; 'at lib'"
    """
    for name in _OWN:
        place = os.environ.get(name, "").rstrip("/")
        if place.count("/") > 1:
            text = text.replace(f"{place}/", "")
    return _FOLDERS.sub(lambda found: "" if Path(found.group(1)).is_dir() else found.group(0), text)

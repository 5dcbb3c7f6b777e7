"""What the process of a job printed, in parts."""

from __future__ import annotations

import re

from preftune.app.jobs.follow import without_paths
from preftune.app.jobs.platform import Platform

LOG = "log.txt"
MAX_LOG = 1 << 20
_CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|[^\S\n\t ]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def read_log(platform: Platform, job_id: str, after: int = 0, limit: int = MAX_LOG) -> tuple[str, int, bool]:
    """(text, the byte to go on from, whether there is more). Whole lines, unless one is longer than ``limit``.

    Control characters are taken out, so that a log cannot move the cursor of whoever reads it; paths become ids.
    """
    path = platform.job_folder(job_id) / LOG
    try:
        with path.open("rb") as file:
            file.seek(after)
            raw = file.read(limit)
            has_more = bool(file.read(1))
    except FileNotFoundError:
        return "", after, False
    if has_more and b"\n" in raw:
        raw = raw[: raw.rfind(b"\n") + 1]
    text = raw.decode("utf-8", "replace").replace("\r\n", "\n").replace("\r", "\n")
    return without_paths(_CONTROL.sub("", text)), after + len(raw), has_more

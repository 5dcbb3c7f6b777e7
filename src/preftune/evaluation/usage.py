"""How often a verdict set was used: a set that chose between many models no longer measures any of them."""

from __future__ import annotations

import datetime
import fcntl
from pathlib import Path
from typing import Any

from preftune.core.errors import InputError
from preftune.core.files import read_json, write_json

USAGE_FILE = "verdict-usage.json"


def count_use(folder: Path, prompts_hash: str, run: str) -> int:
    """Count one more use of these prompts and return how often they have now been used, this time included.

    Parameters
        folder: where the count is kept, such as the cache; two processes may count at once.
        prompts_hash: ``winrate.hash_prompts`` of the set. run: who uses it.

    Raises
        InputError: a count that cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".{USAGE_FILE}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        usage = _read(folder)
        entry = usage.get(prompts_hash, {"count": 0, "runs": []})
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        count = int(entry["count"]) + 1
        usage[prompts_hash] = {"count": count, "runs": [*entry["runs"], {"run": run, "time": now}]}
        write_json(folder / USAGE_FILE, usage)
    return count


def times_used(folder: Path, prompts_hash: str) -> int:
    """How often these prompts were used so far."""
    return int(_read(folder).get(prompts_hash, {"count": 0})["count"])


def _read(folder: Path) -> dict[str, Any]:
    path = folder / USAGE_FILE
    if not path.exists():
        return {}
    try:
        usage = dict(read_json(path))
        for entry in usage.values():
            int(entry["count"])
            list(entry["runs"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: the count of verdict uses cannot be read ({error}); mend it or move it away") from None
    return usage

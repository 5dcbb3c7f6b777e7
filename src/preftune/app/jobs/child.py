"""The process of one job: ``python -m preftune.app.jobs.child FOLDER``. It knows its folder and no database.

The folder holds ``task.json`` (what to do) and gets ``run/`` (a run as the command line makes it), ``report.json`` or
``error.json``. Only one process works in a folder: it holds a lock that ends with the process. When the worker dies, the kernel
tells this process to stop; it checkpoints and ends.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preftune.app.jobs.follow import without_paths
from preftune.core.errors import Blocked, Interrupted, PreftuneError
from preftune.core.files import read_json, write_json
from preftune.core.leaving import end
from preftune.core.loading import own_process

if TYPE_CHECKING:
    from preftune.app.probes import ProbeMode

LOCK_SECONDS = 120.0
TASK, ERROR, REPORT, RUN = "task.json", "error.json", "report.json", "run"
_PR_SET_PDEATHSIG = 1


def main(folder: Path, parent: int) -> int:
    """Do the task in a folder; the exit code is that of the command line."""
    own_process()
    _die_with(parent)
    (folder / ERROR).unlink(missing_ok=True)
    with (folder / "lock").open("a") as lock:
        if not _locked(lock.fileno()):
            write_json(folder / ERROR, {"code": "locked", "message": f"another process works in {folder}"})
            return 1
        try:
            _do(folder, read_json(folder / TASK))
        except Interrupted:
            return Interrupted.exit_code
        except PreftuneError as error:
            code = error.findings[0].code if isinstance(error, Blocked) and error.findings else _slug(type(error).__name__)
            write_json(folder / ERROR, {"code": code, "message": _told(folder, error)})
            return error.exit_code
        except MemoryError:
            write_json(folder / ERROR, {"code": "out_of_memory", "message": "the job ran out of memory; lower tokens_per_pack"})
            return 1
        except OSError as error:
            write_json(folder / ERROR, {"code": "io_error", "message": f"{error.strerror or error}"})
            return 1
        except Exception as error:  # noqa: BLE001 -- a bug of ours: the whole story goes to the log, one line to the user
            traceback.print_exc()
            write_json(folder / ERROR, {"code": "internal_error", "message": f"{type(error).__name__}: {_told(folder, error)}"})
            return 1
    return 0


def _do(folder: Path, task: dict[str, Any]) -> None:
    if task["work"] == "validate":
        from preftune.app.jobs.files import inspect

        write_json(folder / REPORT, inspect(task["path"], task["filename"], task.get("told_as")))
        return
    if task["work"] == "export":
        from preftune.app.jobs.exports import pack

        pack(task, folder)
        return
    if task["work"] == "evaluate":
        from preftune.app.grading.run import run as judge_rows

        judge_rows(task, folder)
        return
    from preftune.app.context import Context
    from preftune.app.recipes import make_recipe
    from preftune.app.runs import RUN_FILE
    from preftune.app.train import prepare_process, resume_run, train

    prepare_process()
    context = Context(Path(task["cache"]), Path(task["state"]))
    run = folder / RUN
    if (run / RUN_FILE).is_file() and (run / "recipe.yaml").is_file():
        resume_run(str(run), context=context, no_probe=task["no_probe"])
    else:
        probe: ProbeMode = "off" if task["no_probe"] else "worthwhile"
        train(make_recipe(task["recipe"], folder), context=context, folder=run, probe=probe)


def _told(folder: Path, error: Exception) -> str:
    """An error in one line, with names of models in the place of their folders."""
    text = " ".join(str(error).split())
    names: dict[str, str] = read_json(folder / TASK).get("names", {})
    for place, name in names.items():
        text = text.replace(place, name) if place.startswith("/") else text
    return without_paths(text)


def _die_with(parent: int) -> None:
    """Ask the kernel for SIGTERM when the worker dies; end at once where it is dead already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(Interrupted.exit_code)


def _locked(descriptor: int) -> bool:
    """Take the folder's lock; a process that is about to end is waited for."""
    until = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                return False
            time.sleep(0.2)
        else:
            return True


def _slug(name: str) -> str:
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).strip("_")


if __name__ == "__main__":
    end(main(Path(sys.argv[1]), int(sys.argv[2])))

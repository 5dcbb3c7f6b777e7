"""From a run folder to a job's events and progress. The folder is the truth; what was told is kept with the job."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from preftune.app.jobs.platform import event
from preftune.core.files import read_json
from preftune.core.places import without_places
from preftune.store.records import Event, Job, Level

EVENTS_AT_ONCE = 200
Places: TypeAlias = dict[str, tuple[int, int]]  # a file's path to its inode and how many bytes of it were told
_LEVELS: dict[str, Level] = {"warning": "warn", "blocker": "error", "error": "error"}


_SHOWN = {"step": ("loss", "loss"), "eval": ("eval_loss", "loss"), "probe": ("kl", "KL")}
_WORDS = {"step": "step", "eval": "held out", "probe": "probe"}


@dataclass(frozen=True, slots=True)
class Told:
    """What happened in a run folder since it was looked at last, the progress that says so, and where to read on."""

    events: list[Event]
    progress: dict[str, Any]
    places: Places


def follow(job: Job, run: Path, places: Mapping[str, tuple[int, int]]) -> Told:
    """New metrics, notes and checkpoints of a run, at most EVENTS_AT_ONCE at a time.

    ``progress`` remembers the last step told of each stage, the notes told and the checkpoints told. A step that a resumed
    process does again is not told twice; half a line is left for the next time. ``places``, of the call before, saves reading
    a long run from its start each time; without it the same is told.
    """
    progress = json.loads(json.dumps(job.progress))
    told: dict[str, int] = progress.setdefault("told", {})
    events: list[Event] = []
    read = dict(places)
    for stage in sorted((run / "stages").glob("*"), key=_number):
        events += _metrics(job, stage, progress, EVENTS_AT_ONCE - len(events), read)
        events += _checkpoints(job, stage, progress)
    events += _notes(job, run / "events.jsonl", told)
    return Told(events, progress, read)


def _metrics(job: Job, stage: Path, progress: dict[str, Any], room: int, places: Places) -> list[Event]:
    events: list[Event] = []
    told: dict[str, int] = progress["told"]
    path = stage / "metrics.jsonl"
    for place_of_line, row in _lines_on(path, places):
        step, kind = int(row.get("step", 0)), _kind(row)
        place = stage.name if kind == "step" else f"{stage.name}/{kind}"
        is_told = step <= told.get(place, 0 if kind == "step" else -1)
        if not is_told and len(events) >= room:
            break
        places[str(path)] = place_of_line
        if is_told:
            continue
        told[place] = step
        numbers = {key: value for key, value in row.items() if isinstance(value, (int, float)) and key != "step"}
        name, label = _SHOWN[kind]
        shown = numbers.get(name)
        message = f"{stage.name.partition('-')[2]} {_WORDS[kind]} {step}" + ("" if shown is None else f": {label} {shown:.4f}")
        events.append(event(job.id, job.project, "metrics", message, step=step, stage=stage.name, metrics=numbers))
        if kind == "step":
            progress |= {"stage": stage.name, "step": step, "metrics": numbers}
    return events


def _kind(row: Mapping[str, Any]) -> str:
    """What a line of metrics tells of: a training step, held-out rows, or completions sampled on the way."""
    if any(key.startswith("eval_") for key in row):
        return "eval"
    return "step" if "loss" in row else "probe"


def _checkpoints(job: Job, stage: Path, progress: dict[str, Any]) -> list[Event]:
    known: list[str] = progress.setdefault("checkpoints", [])
    events = []
    for folder in sorted((stage / "checkpoints").glob("step-*")):
        name = f"{stage.name}/{folder.name}"
        if name not in known and (folder / "manifest.json").is_file():
            known.append(name)
            step = int(folder.name.partition("-")[2])
            events.append(event(job.id, job.project, "checkpoint", f"checkpoint of step {step}", step=step, stage=stage.name))
    return events


def _notes(job: Job, path: Path, told: dict[str, int]) -> list[Event]:
    rows = _lines(path)
    fresh = rows[told.get("notes", 0) :]
    told["notes"] = len(rows)
    return [
        event(
            job.id,
            job.project,
            str(row["code"]),
            without_paths(str(row["message"])),
            level=_LEVELS.get(str(row["level"]), "info"),
        )
        for row in fresh
    ]


def without_paths(text: str) -> str:
    """The same words with file ids and job ids where they name places of this machine, and other places by their last name.

    >>> without_paths("first /srv/artifacts/files/file-0123456789abcdef01234567-ab12.jsonl:3; see /srv/jobs/job-1/run/x.json")
    'first file-0123456789abcdef01234567:3; see job-1/run/x.json'
    """
    named = re.sub(r"[^\s'\"]*/files/(file-[0-9a-f]{24})(?:-[0-9a-f]+)?(?:\.[a-z]+)*", r"\1", text)
    return without_places(re.sub(r"[^\s'\"]*/jobs/((?:ft|job|eval)-[0-9a-f-]+)", r"\1", named))


def _lines(path: Path) -> list[Mapping[str, Any]]:
    """The whole lines of a JSON Lines file that somebody may be writing."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].split("\n") if line.strip()]


def _lines_on(path: Path, places: Mapping[str, tuple[int, int]]) -> Iterator[tuple[tuple[int, int], Mapping[str, Any]]]:
    """The whole lines that were not told yet, each with the place behind it. A resumed run writes the file anew."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        inode = os.fstat(file.fileno()).st_ino
        known, at = places.get(str(path), (inode, 0))
        at = at if known == inode else 0
        file.seek(at)
        for line in file:
            if not line.endswith(b"\n"):
                return
            at += len(line)
            if line.strip():
                yield (inode, at), json.loads(line)


def _number(stage: Path) -> int:
    head = stage.name.partition("-")[0]
    return int(head) if head.isdigit() else 0


def named_stages(job: Job, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The stages of a finished run as a client is told of them: each started from a name, not from a folder of this machine."""
    stages = [dict(one) for one in record.get("stages", ())]
    before = job.model
    for stage, asked in zip(stages, job.recipe["stages"], strict=False):
        stage["start"] = asked.get("from_checkpoint") or before
        before = str(stage.get("name") or before)
    return stages


def run_record(run: Path) -> dict[str, Any]:
    """``run.json`` of a run, empty where there is none yet."""
    path = run / "run.json"
    return dict(read_json(path)) if path.is_file() else {}

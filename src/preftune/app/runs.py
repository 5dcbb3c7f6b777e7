"""The run folder: the truth of a run. Created once, its status rewritten atomically, read back by every verb.

RUN/recipe.yaml        the resolved recipe
RUN/run.json           id, status, stages
RUN/events.jsonl       what was said while it ran
RUN/excluded.jsonl     rows that were left out, each with its reason
RUN/stages/1-sft/      metrics.jsonl, checkpoints/step-000010/, final/ (a model folder)
RUN/evaluation/        report.json, report.md, report.html, completions.jsonl
"""

from __future__ import annotations

import datetime
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preftune.core.errors import CheckpointError, InputError, UsageError
from preftune.core.files import read_json, write_json
from preftune.core.registry import suggest
from preftune.core.version import __version__

RUN_FILE = "run.json"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """One run on disk.

    Parameters
        is_ours: whether this process writes it; of several that train together only the first one does.
    """

    path: Path
    is_ours: bool = True

    @classmethod
    def create(cls, output: Path, name: str, at: Path | None = None) -> RunFolder:
        """A new folder ``NAME-DATE-4HEX`` below ``output``, or ``at``; never one that holds a run."""
        now = datetime.datetime.now(datetime.UTC)
        path = output.resolve() / folder_name(name, now) if at is None else at.resolve()
        path.mkdir(parents=True, exist_ok=at is not None)
        run = cls(path)
        run.update({"id": path.name, "name": name, "created": now.isoformat(timespec="seconds"), "preftune": __version__,
                    "status": "running", "stages": []})  # fmt: skip
        return run

    @classmethod
    def open(cls, given: str, output: Path) -> RunFolder:
        """The run of that path or name; UsageError lists what there is."""
        for path in (Path(given).expanduser(), output / given):
            if (path / RUN_FILE).is_file():
                return cls(path.resolve())
        names = [run.path.name for run in list_runs(output)]
        known = suggest(given, names) if names else f"there is none in {output}"
        raise UsageError(f"no run {given!r}: {known}; `preftune ls runs` lists them")

    def read(self) -> dict[str, Any]:
        """The content of ``run.json``."""
        try:
            return dict(read_json(self.path / RUN_FILE))
        except (OSError, ValueError) as error:
            raise InputError(f"{self.path / RUN_FILE}: cannot be read: {str(error).splitlines()[0]}") from None

    def update(self, changes: Mapping[str, Any]) -> None:
        """Change fields of ``run.json`` atomically."""
        if not self.is_ours:
            return
        now = self.read() if (self.path / RUN_FILE).exists() else {}
        write_json(self.path / RUN_FILE, {**now, **changes})

    def update_stage(self, index: int, changes: Mapping[str, Any]) -> None:
        """Change fields of one stage's record."""
        if not self.is_ours:
            return
        stages = list(self.read()["stages"])
        while len(stages) <= index:
            stages.append({})
        stages[index] = {**stages[index], **changes}
        self.update({"stages": stages})

    def stop(self, status: str, **changes: Any) -> None:
        """The run and the stage it was at end as ``status``: ``failed`` or ``interrupted``."""
        if not self.is_ours:
            return
        stages = [{**one, "status": status} if one.get("status") == "running" else one for one in self.read()["stages"]]
        self.update({"status": status, "stages": stages, **changes})

    def stage_folder(self, index: int, name: str) -> Path:
        """The folder of a stage."""
        return self.path / "stages" / f"{index + 1}-{name}"

    def newest_report(self) -> Path | None:
        """The ``report.json`` of the last evaluation, or None."""
        reports = list(self.path.glob("evaluation*/report.json"))
        return max(reports, key=lambda path: (path.stat().st_mtime_ns, path.parent.name), default=None)

    @property
    def recipe_path(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"


def folder_name(name: str, now: datetime.datetime) -> str:
    """``NAME-DATE-4HEX``, with what a file name cannot hold replaced."""
    stem = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name) or "run"
    return f"{stem}-{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def list_runs(output: Path) -> list[RunFolder]:
    """Runs below a folder, oldest first."""
    if not output.is_dir():
        return []
    found = [RunFolder(path.parent) for path in output.glob(f"*/{RUN_FILE}")]
    return sorted(found, key=lambda run: (run.read().get("created", ""), run.path.name))


def find_model(given: str, output: Path, what: str = "from_checkpoint") -> Path:
    """The model folder that ``from_checkpoint`` means: a run, ``RUN@STEP``, a checkpoint or a model folder.

    Parameters
        what: how a message calls it.

    Raises
        CheckpointError: there is no such run, step or model; the message lists the steps that exist.
    """
    name, _, step = given.rpartition("@") if "@" in given else (given, "", "")
    path = next((one.resolve() for one in (Path(name).expanduser(), output / name) if one.is_dir()), None)
    if path is None:
        raise CheckpointError(f"{what} {given!r}: no run or folder of that name; `preftune ls runs` lists the runs")
    if (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
        return path
    if (path / "model").is_dir() and (path / "manifest.json").is_file():
        return path / "model"
    stages = (
        [path]
        if (path / "checkpoints").is_dir() or (path / "final").is_dir()
        else sorted((path / "stages").glob("*"), key=_stage_number)
    )
    if step:
        return _find_step(f"{what} {given!r}", stages, step)
    for stage in reversed(stages):
        if (stage / "final").is_dir():
            return stage / "final"
    raise CheckpointError(f"{what} {given!r}: {path} holds no finished stage; name a step, such as {name}@10")


def _find_step(who: str, stages: list[Path], step: str) -> Path:
    known: list[str] = []
    for stage in reversed(stages):
        for checkpoint in sorted((stage / "checkpoints").glob("step-*")):
            number = checkpoint.name.removeprefix("step-")
            if step.isdigit() and number.isdigit() and int(number) == int(step):
                return checkpoint / "model"
            known.append(str(int(number)) if number.isdigit() else number)
        last = _last_step(stage)
        if last is not None:
            if step == str(last):
                return stage / "final"
            known.append(str(last))
    raise CheckpointError(f"{who}: no checkpoint of step {step}; there is {', '.join(known) or 'none'}")


def _last_step(stage: Path) -> int | None:
    """The step whose weights are the stage's final ones; None where the stage has not ended, or kept its best checkpoint."""
    if not ((stage / "final").is_dir() and (stage / "result.json").is_file()):
        return None
    result = read_json(stage / "result.json")
    steps = int(result["steps"])
    return steps if result.get("kept_step", steps) in {0, steps} else None


def _stage_number(path: Path) -> int:
    number = path.name.partition("-")[0]
    return int(number) if number.isdigit() else 0

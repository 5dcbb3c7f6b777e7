"""Comparisons as jobs: names and ids of a project in the place of the folders and files that `preftune compare` takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from preftune.app.jobs.models import find_model
from preftune.app.jobs.platform import Platform
from preftune.core.errors import UsageError
from preftune.judging.base import judges
from preftune.store.records import File, Job

KIND = "contest"
MAX_RULES = 200
JUDGES = ("rules", "reward_model")


def check_judge(platform: Platform, project: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The judge as it is kept: its rules, or a reward model by the name that it is registered under.

    Raises
        UsageError: another judge, an option that it does not have, a pattern that is none, a model that is not there.
    """
    judge = dict(given)
    name = judge.get("name")
    if name not in JUDGES:
        raise UsageError(
            f"judge: name is one of {', '.join(JUDGES)}, got {str(name)[:80]!r}; a model that judges is asked by /v1/evaluation "
            "(compare) or by a label_model grader of /v1/evals"
        )
    if name == "reward_model":
        if judge.get("revision") is not None:
            raise UsageError("judge: revision is not taken; a registered model has one")
        if not isinstance(judge.get("model"), str):
            raise UsageError("judge: model is missing; it is the name of a registered reward model")
        find_model(platform, project, judge["model"])
    rules = judge.get("rules")
    if isinstance(rules, list) and len(rules) > MAX_RULES:
        raise UsageError(f"judge: {len(rules)} rules; up to {MAX_RULES} are taken")
    judges.build(name, {key: value for key, value in judge.items() if key != "name"})
    return judge


def contest_task(platform: Platform, job: Job) -> dict[str, Any]:
    """What the process of a comparison is told.

    Raises
        UsageError: a model or a file was deleted.
    """
    task = job.recipe
    judge = dict(task["judge"])
    if judge["name"] == "reward_model":
        judge |= {"model": find_model(platform, job.project, judge["model"]).run, "title": judge.get("title") or judge["model"]}
    sides = {key: _side(platform, job.project, task[key]) for key in ("first", "second")}
    called = [_called(task[key]) for key in ("first", "second")]
    return {
        "work": "evaluate", "kind": KIND, "judge": judge, "settings": task["settings"], **sides, "called": called,
        "path": str(_path(platform, job.project, task["prompts"])),
    }  # fmt: skip


def _side(platform: Platform, project: str, side: Mapping[str, Any]) -> str:
    if side.get("file"):
        return str(_path(platform, project, side["file"]))
    return find_model(platform, project, side["model"]).run


def _called(side: Mapping[str, Any]) -> str:
    return str(side.get("model") or side["file"])


def _path(platform: Platform, project: str, file_id: str) -> Path:
    file = platform.store.get(File, file_id, project)
    if file is None:
        raise UsageError(f"file {file_id!r} was deleted")
    return platform.artifacts.local(file.artifact, platform.context.cache / "artifacts")

"""Models by name: what a job may start from, and what it leaves behind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from preftune.app.jobs.exports import forget_archives
from preftune.app.jobs.follow import run_record
from preftune.app.jobs.platform import DEFAULT_PROJECT, Platform, event
from preftune.app.jobs.states import WrongState, active_jobs
from preftune.core.errors import UsageError
from preftune.core.registry import suggest
from preftune.store.base import Conflict, Query, every
from preftune.store.records import File, Job, ModelVersion, Resource, new_id, now

PAGE = 1000
SUGGESTED = 1000  # newest models whose names are compared with one that is not there


def add_base_model(platform: Platform, name: str, folder: str) -> ModelVersion:
    """Offer a model that jobs may start from and that may be served; only the operator names folders."""
    found = platform.store.page(ModelVersion, Query(None, {"name": name, "form": "base"}, limit=1)).items
    if found and found[0].run == folder:
        return found[0]
    project = platform.project(DEFAULT_PROJECT).id
    version = 1 + platform.store.count(ModelVersion, Query(project, {"name": name}, with_deleted=True))
    model = ModelVersion(id=new_id("ml_"), project=project, name=name, version=version, form="base", run=folder)
    return platform.store.insert(model)


def find_model(platform: Platform, project: str, name: str) -> ModelVersion:
    """The newest version of that name in the project, ``NAME:STEP`` of a checkpoint or of the end, or a base model for all.

    A model's, a job's or an active deployment's id is a name too, and so is the name of Together's endpoint.

    Raises
        UsageError: no such model; the message lists those that there are. Or a deployment that is not active.
    """
    for query in (Query(project, {"name": name}, limit=1), Query(None, {"name": name, "form": "base"}, limit=1)):
        found = platform.store.page(ModelVersion, query).items
        if found:
            return found[0]
    by_id = platform.store.get(ModelVersion, name, project) or _stand_in(platform, project, name)
    if by_id is not None:
        return by_id
    names = sorted({model.name for model in islice(list_models(platform, project), SUGGESTED)})
    raise UsageError(f"there is no model {name!r}: {suggest(name, names) if names else 'none is offered'}")


def _stand_in(platform: Platform, project: str, name: str) -> ModelVersion | None:
    """The end of a run by its step; the model of a job, by the job's id, or of a deployment, by its id or its endpoint's name."""
    head, _, step = name.rpartition(":")
    if head and step.isdecimal():  # checkpoints have such names; the end of a run has its own name, and its step is known
        last = platform.store.page(ModelVersion, Query(project, {"name": head}, limit=1)).items
        return last[0] if last and str(last[0].step) == step else None
    job = platform.store.get(Job, name, project)
    if job is not None:
        if job.result.get("is_demoted"):
            raise UsageError(f"the model of run {name!r} was demoted; promote it first")
        made = platform.store.page(ModelVersion, Query(project, {"name": job.name, "job": job.id}, limit=1)).items
        return made[0] if made else None
    deployment = platform.store.get(Resource, name, project)
    if deployment is None and "/" in name:
        where = {"type": "together.deployment", "name": name}
        found = platform.store.page(Resource, Query(project, where, limit=1)).items
        deployment = found[0] if found else None
    if deployment is None or "model" not in deployment.body or not deployment.type.endswith("deployment"):
        return None
    if not deployment.body.get("is_active"):
        raise UsageError(f"deployment {name!r} is not active; promote it first")
    return platform.store.get(ModelVersion, deployment.body["model"])


def list_models(platform: Platform, project: str) -> Iterator[ModelVersion]:
    """Models that a project may use: its own, and the base models."""
    yield from every(platform.store, ModelVersion, Query(project, limit=PAGE))
    yield from (model for model in base_models(platform) if model.project != project)


def base_models(platform: Platform) -> Iterator[ModelVersion]:
    """The models that the operator offers, newest first."""
    return every(platform.store, ModelVersion, Query(None, {"form": "base"}, limit=PAGE))


def delete_model(platform: Platform, model: ModelVersion) -> None:
    """Take a tuned model out of every list, and the archives that were packed of it away.

    Raises
        WrongState: a job that has not ended begins from it.
    """
    for job in active_jobs(platform, model.project):
        for stage in job.recipe.get("stages", ()):
            with contextlib.suppress(UsageError):
                if stage.get("from_checkpoint") and start_of(platform, model.project, stage["from_checkpoint"]).id == model.id:
                    raise WrongState(
                        f"model {model.name} is where job {job.id} begins, which is {job.status}; cancel the job, or let it end"
                    )
    platform.store.change(ModelVersion, model.id, {"deleted_at": now()})
    forget_archives(platform, model)


def max_tokens_of(model: ModelVersion) -> int:
    """The longest row, in tokens, that a model's configuration allows."""
    from preftune.core.recipe import ModelConfig
    from preftune.modeling.load import read_max_positions

    return read_max_positions(ModelConfig(name=model.run))


def num_bytes_of(model: ModelVersion) -> int:
    """Bytes of a model's weights on this machine; 0 where its folder is not here."""
    from preftune.core.errors import InputError
    from preftune.modeling.load import model_path

    try:
        folder = Path(model_path(model.run))
    except InputError:
        return 0
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def resolve(platform: Platform, job: Job) -> dict[str, Any]:
    """A job's recipe with names and ids turned into folders and files of this machine.

    Raises
        UsageError: a model or file that does not exist.
    """
    recipe = dict(job.recipe)
    recipe["model"] = {**recipe["model"], "name": _folder(platform, job.project, recipe["model"]["name"])}
    recipe["stages"] = [_stage(platform, job.project, stage) for stage in recipe["stages"]]
    return recipe


def register_models(platform: Platform, job: Job, run: Path) -> list[ModelVersion]:
    """Make a finished run's checkpoints and its final model known; the final one comes last and bears the job's name."""
    stages = run_record(run)["stages"]
    last = run / "stages" / f"{len(stages)}-{stages[-1]['name']}"
    base = find_model(platform, job.project, job.model)
    made: list[ModelVersion] = []

    def add(name: str, folder: Path, step: int | None, metrics: dict[str, Any]) -> None:
        model = ModelVersion(
            id=new_id("ml_"), project=job.project, name=name, version=1, form=_form(folder), base=base.id, parent=base.id,
            job=job.id, run=str(folder), step=step, datasets=job.files, facts={"metrics": metrics},
        )  # fmt: skip
        made.append(_add(platform, model))

    for folder in sorted((last / "checkpoints").glob("step-*")):
        step = int(folder.name.partition("-")[2])
        add(f"{job.name}:{step}", folder / "model", step, _checkpoint_metrics(last, step))
    add(job.name, run / stages[-1]["final"], stages[-1].get("steps"), stages[-1].get("metrics", {}))
    return made


def _add(platform: Platform, model: ModelVersion) -> ModelVersion:
    """Insert once: an attempt that died after this is not told of twice."""
    known = platform.store.page(ModelVersion, Query(model.project, {"name": model.name, "job": model.job}, limit=1)).items
    if known:
        return known[0]
    while True:
        version = 1 + platform.store.count(ModelVersion, Query(model.project, {"name": model.name}, with_deleted=True))
        said = event(model.id, model.project, "registered", f"model {model.name} version {version}", job=model.job)
        try:
            return platform.store.insert(model.model_copy(update={"version": version}), [said])
        except Conflict:
            continue


def _stage(platform: Platform, project: str, stage: dict[str, Any]) -> dict[str, Any]:
    resolved = dict(stage)
    data = dict(resolved.get("data") or {})
    if data:
        data["train"] = [_file(platform, project, one) for one in data["train"]]
        if isinstance(data.get("select"), str):
            data["select"] = _file(platform, project, data["select"])
        resolved["data"] = data
    if resolved.get("from_checkpoint"):
        resolved["from_checkpoint"] = _folder(platform, project, resolved["from_checkpoint"])
    return resolved


def _file(platform: Platform, project: str, file_id: str) -> str:
    file = platform.store.get(File, file_id, project)
    if file is None:
        raise UsageError(f"there is no file {file_id!r}; upload it first")
    return str(platform.artifacts.local(file.artifact, platform.context.cache / "artifacts"))


def start_of(platform: Platform, project: str, name: str) -> ModelVersion:
    """The model that ``JOB``, ``JOB:STEP``, ``NAME`` or ``NAME:STEP`` names: what ``from_checkpoint`` takes.

    The last step of a job is its final model.

    Raises
        UsageError: no such model, or the job has not made it yet.
    """
    job_id, _, step = name.partition(":")
    job = platform.store.get(Job, job_id, project)
    if job is None:
        return find_model(platform, project, name)
    if not step:
        return find_model(platform, project, job.name)
    made = platform.store.page(ModelVersion, Query(project, {"job": job.id}, limit=1000)).items
    for model in made:
        if str(model.step) == step:
            return model
    steps = ", ".join(str(model.step) for model in reversed(made)) or "none yet"
    raise UsageError(f"job {job.id} has no checkpoint of step {step}; it has {steps}")


def _folder(platform: Platform, project: str, name: str) -> str:
    return start_of(platform, project, name).run


def _form(folder: Path) -> Any:
    return "adapter" if (folder / "adapter_config.json").is_file() else "full"


def _checkpoint_metrics(stage: Path, step: int) -> dict[str, float]:
    """The last metrics at or before a step, training and held-out."""
    import json

    found: dict[str, float] = {}
    path = stage / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        row = json.loads(line)
        if row.get("step", 0) <= step:
            found.update({key: value for key, value in row.items() if isinstance(value, (int, float))})
    return found

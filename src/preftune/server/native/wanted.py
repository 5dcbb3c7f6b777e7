"""What a native request asks of training, as a job with its checked recipe. Nothing in it becomes a path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from preftune.app.jobs.models import find_model, start_of
from preftune.app.jobs.platform import Platform
from preftune.app.recipes import check_recipe
from preftune.core.api import NewJob
from preftune.core.recipe import Recipe
from preftune.server.errors import ApiError
from preftune.server.recipes import without_secrets
from preftune.store.records import File, Job, ModelVersion, new_id

# keys of a recipe that name places of a machine, or that another verb does
NOT_HERE = ("output", "evaluation", "sweep", "tracking", "rounds", "prompts_per_round", "name")
TEMPLATES = ("chatml", "plain")


def job_wanted(platform: Platform, project: str, body: NewJob, idempotency: str | None) -> Job:
    """The job that is asked for.

    Raises
        ApiError: a key that cannot be set here, a model or a file that is not there.
        RecipeError: a recipe that does not validate.
    """
    given = _given(body)
    for key in NOT_HERE:
        if key in given:
            raise ApiError(400, f"recipe.{key} cannot be set here; leave it out", param=f"recipe.{key}")
    base = _base(platform, project, given)
    model = given.get("model")
    given["model"] = {**(model if isinstance(model, Mapping) else {}), "name": base.name}
    recipe = check_recipe(given)
    _check(platform, project, recipe)
    files = tuple(dict.fromkeys(_files(platform, project, recipe)))
    job_id = new_id("ft-")
    tail = f"{body.suffix}-{job_id[3:11]}" if body.suffix else job_id[3:11]
    kept = recipe.model_dump(mode="json", exclude=set(NOT_HERE))
    return Job(
        id=job_id, project=project, work="train", dialect="native", request=without_secrets(body.model_dump(exclude_unset=True)),
        recipe=kept, model=base.name, files=files, name=f"{base.name}-{tail}", metadata=body.metadata, priority=body.priority,
        idempotency=idempotency, no_probe=body.no_probe,
    )  # fmt: skip


def _given(body: NewJob) -> dict[str, Any]:
    """The recipe that was given, or the one that the simple fields mean."""
    simple = body.model_dump(exclude_unset=True, exclude={"recipe", "suffix", "metadata", "priority", "wandb", "no_probe"})
    if body.recipe is not None:
        if simple:
            raise ApiError(400, f"{next(iter(simple))} belongs into recipe when recipe is given", param=next(iter(simple)))
        return dict(body.recipe)
    if not body.files:
        raise ApiError(400, "files is missing; upload a file and name its id", param="files", code="missing_required_parameter")
    stage: dict[str, Any] = {"method": body.method or "dpo", **body.options}
    if body.loss:
        stage["loss"] = body.loss
    if body.from_checkpoint:
        stage["from_checkpoint"] = body.from_checkpoint
    data = stage.get("data")
    if data is not None and not isinstance(data, Mapping):
        raise ApiError(400, "options.data: write a mapping, such as {max_length: 512}", param="options.data")
    stage["data"] = {**(data or {}), "train": body.files} | ({"select": body.validation} if body.validation else {})
    recipe: dict[str, Any] = {"stages": [stage]}
    if body.model:
        recipe["model"] = body.model
    if body.seed is not None:
        recipe["seed"] = body.seed
    return recipe


def _base(platform: Platform, project: str, given: Mapping[str, Any]) -> ModelVersion:
    """The registered model that training begins from; of a checkpoint, the base beneath it."""
    model = given.get("model")
    name = model.get("name") if isinstance(model, Mapping) else model
    if name is not None and not isinstance(name, str):
        raise ApiError(400, "model: write the name of a registered model", param="model")
    if name:
        found = find_model(platform, project, name)
        return platform.store.get(ModelVersion, found.base) or found if found.form == "adapter" else found
    stages = given.get("stages")
    first = stages[0] if isinstance(stages, list) and stages else given
    start = first.get("from_checkpoint") if isinstance(first, Mapping) else None
    if not isinstance(start, str) or not start:
        raise ApiError(
            400,
            "model is missing; name a registered model, or a from_checkpoint",
            param="model",
            code="missing_required_parameter",
        )
    begun = start_of(platform, project, start)
    return (platform.store.get(ModelVersion, begun.base) if begun.base else None) or begun


def _check(platform: Platform, project: str, recipe: Recipe) -> None:
    """Refuse what would reach beyond the installation's own names."""
    if recipe.model.chat_template not in {None, *TEMPLATES}:
        raise ApiError(400, "model.chat_template: write chatml or plain", param="model.chat_template")
    if recipe.model.revision is not None:
        raise ApiError(400, "model.revision: a registered model has one; leave it out", param="model.revision")
    for number, stage in enumerate(recipe.stages):
        where = f"stages.{number}"
        if stage.kind != "train":
            raise ApiError(
                400, f"{where}.method: a job trains on uploaded files; make pairs with `preftune generate`", param=where
            )
        if stage.distributed != "auto":
            raise ApiError(
                400, f"{where}.distributed: a job trains in one process; `torchrun -m preftune train RECIPE` starts several",
                param=f"{where}.distributed",
            )  # fmt: skip
        if stage.reference is not None and stage.reference.model is not None:
            raise ApiError(400, f"{where}.reference.model cannot be set here; leave it out", param=f"{where}.reference")
        if stage.data is None:
            raise ApiError(400, f"{where}.data is missing; name the ids of uploaded files", param=f"{where}.data")
        if stage.from_checkpoint:
            start_of(platform, project, stage.from_checkpoint)
        if stage.early_stopping is not None and not stage.data.select:
            raise ApiError(400, f"{where}: early stopping needs data.select to measure on", param=f"{where}.early_stopping")


def _files(platform: Platform, project: str, recipe: Recipe) -> list[str]:
    """Ids of all files of a recipe, in order."""
    found: list[str] = []
    for stage in recipe.stages:
        if stage.data is not None:
            found += [*stage.data.train, *([stage.data.select] if isinstance(stage.data.select, str) else [])]
    if not found:
        raise ApiError(400, "data.train is empty; name the id of an uploaded file", param="data.train")
    for file_id in found:
        if platform.store.get(File, file_id, project) is None:
            raise ApiError(400, f"there is no file {file_id[:80]!r}; upload it first", param="files", code="file_not_found")
    return found
